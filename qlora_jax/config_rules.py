"""What a field of the configuration may hold, and what to say when it holds something else.

These functions see configurations as flat dicts from dotted name (`lora.rank`) to value.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from ml_collections import config_dict

from qlora_jax import errors
from qlora_jax.data import chat_formats, line_formats, mixture, sets


@dataclasses.dataclass(frozen=True)
class _Rule:
    holds: Callable[[Any], bool]
    needs: str


def _one_of(*values: Any) -> _Rule:
    names = ", ".join(str(value) or "'' (empty)" for value in values)
    return _Rule(lambda value: value in values, f"one of {names}")


def _at_least(least: int) -> _Rule:
    return _Rule(lambda value: value >= least, f"at least {least}")


def _is_where(value: str) -> bool:
    try:
        re.compile(value)
    except re.error:
        return False
    return bool(value)


_NOT_EMPTY = _Rule(
    bool,
    "a file, a directory, package:<package>/<file inside it> or a name on the Hugging Face Hub",
)
_NO_HUB = "the set is on no hub in files that can be read"
_POSITIVE = _Rule(lambda value: 0 < value, "more than 0")
_POSITIVE_FINITE = _Rule(lambda value: 0 < value < math.inf, "more than 0 and finite")
_FRACTION = _Rule(lambda value: 0 <= value < 1, "at least 0 and less than 1")
_DTYPES = ("float32", "bfloat16", "float16")

_RULES = {
    "seed": _Rule(lambda value: 0 <= value < 2**32, "at least 0 and less than 2**32"),
    "model.path": _NOT_EMPTY,
    "model.quant_type": _one_of("nf4", "fp4", "int4"),
    "model.block_size": _one_of(32, 64, 128, 256, 512, 1024, 2048, 4096),
    "model.vocab_quant_type": _one_of("none", "int8"),
    "model.compute_dtype": _one_of("auto", *_DTYPES),
    "model.remat": _one_of("auto", "none", "full", "projections", "dots", "offload"),
    "model.sequence_chunk": _at_least(0),
    "lora.rank": _at_least(1),
    "lora.alpha": _POSITIVE_FINITE,
    "lora.dropout": _FRACTION,
    "lora.init": _Rule(
        lambda value: re.fullmatch("default|pissa(_niter_[0-9]+)?|olora|loftq", value) is not None,
        "one of default, pissa, pissa_niter_<n>, olora, loftq",
    ),
    "lora.loftq_iterations": _at_least(1),
    "lora.where": _Rule(_is_where, "all-linear or a regular expression"),
    "lora.dtype": _one_of(*_DTYPES),
    "data.name": _one_of("", *sets.SETS),
    "data.format": _one_of("auto", *line_formats.LINE_FORMATS, "mmlu_cot"),
    "data.chat_format": _one_of("auto", "model", *chat_formats.CHAT_FORMATS),
    "data.max_len": _at_least(3),
    "data.source_max_len": _at_least(0),
    "data.target_max_len": _at_least(0),
    "data.train_on": _one_of("auto", "assistant", "all"),
    "data.eval_fraction": _FRACTION,
    "data.on_bad_record": _one_of("error", "skip"),
    "data.max_records": _at_least(0),
    "data.cache_dir": _Rule(bool, "a folder, or auto, or none"),
    "optimizer.name": _one_of("adamw", "adamw8bit", "lion"),
    "optimizer.learning_rate": _POSITIVE_FINITE,
    "optimizer.schedule": _one_of("constant", "linear", "cosine"),
    "optimizer.warmup_steps": _at_least(0),
    "optimizer.b1": _FRACTION,
    "optimizer.b2": _FRACTION,
    "optimizer.eps": _POSITIVE_FINITE,
    "optimizer.weight_decay": _at_least(0),
    "optimizer.max_grad_norm": _POSITIVE,
    "optimizer.device_budget_gb": _at_least(0),
    "train.steps": _at_least(0),
    "train.epochs": _POSITIVE_FINITE,
    "train.batch_size": _at_least(1),
    "train.grad_accum": _at_least(1),
    "train.log_every": _at_least(1),
    "train.max_skipped_steps": _at_least(0),
    "train.neftune_alpha": _Rule(lambda value: 0 <= value < math.inf, "at least 0 and finite"),
    "train.loss_chunk": _at_least(1),
    "eval.every": _at_least(0),
    "eval.batch_size": _at_least(1),
    "eval.mmlu_max_questions": _at_least(0),
    "sample.max_new_tokens": _at_least(1),
    "checkpoint.every": _at_least(1),
    "checkpoint.keep": _at_least(1),
}

TYPE_NAMES = {int: "an integer", float: "a number", bool: "true or false", str: "a text"}


def flatten(config: Mapping[str, Any] | config_dict.ConfigDict, prefix: str = "") -> dict[str, Any]:
    """Flattens nested sections into one dict with dotted names.

    Example:
        >>> flatten({"seed": 0, "lora": {"rank": 64}})
        {'seed': 0, 'lora.rank': 64}
    """
    fields = {}
    for name, value in config.items():
        if isinstance(value, Mapping | config_dict.ConfigDict):
            fields |= flatten(value, f"{prefix}{name}.")
        else:
            fields[prefix + name] = value
    return fields


def nearest_field(name: str, known: Iterable[str]) -> str | None:
    """Returns the field that `name` was most likely meant to be, or None.

    A field of the same name in another section comes first, then a similar one in the same
    section, then a similar one anywhere.

    Args:
        name: a dotted name that is no field.
        known: the dotted names of all fields.

    Example:
        >>> nearest_field("lora.rnak", ["lora.rank", "data.path"])
        'lora.rank'
        >>> nearest_field("rank", ["lora.rank", "data.path"])
        'lora.rank'
    """
    section, _, leaf = name.rpartition(".")
    leaves = {field: field.rpartition(".")[2] for field in known}
    if same_leaf := [field for field in leaves if leaves[field] == leaf]:
        return errors.nearest(name, same_leaf, cutoff=0.0)
    for prefix in (section + ".", ""):
        siblings = {leaves[field]: field for field in leaves if field.startswith(prefix)}
        if sibling := errors.nearest(leaf, siblings):
            return siblings[sibling]
    return errors.nearest(name, leaves)


def unknown_field(name: str, known: Iterable[str]) -> str:
    """Says that there is no such field, and what comes nearest.

    Example:
        >>> unknown_field("lora", ["lora.rank", "lora.alpha"])
        'lora is a section, not a field; its fields are lora.rank, lora.alpha'
    """
    inside = [field for field in known if field.startswith(name + ".")]
    if inside:
        return f"{name} is a section, not a field; its fields are {', '.join(inside)}"
    match = nearest_field(name, known)
    hint = f"did you mean {match}?" if match else "qlora_jax/config.py lists them all"
    return f"there is no field {name}; {hint}"


def type_problems(fields: Mapping[str, Any], base: Mapping[str, Any]) -> list[str]:
    """Says which fields are unknown, and which hold another type than in the base.

    Args:
        fields: dotted names and their values.
        base: the same of the base configuration.

    Example:
        >>> type_problems({"seed": "one"}, {"seed": 0})
        ["seed: got 'one', needs to be an integer"]
    """
    problems = []
    for name, value in fields.items():
        if name not in base:
            problems.append(unknown_field(name, base))
            continue
        wanted = type(base[name])
        # bool is an int to Python, but True steps are a mistake; an int is a fine float.
        if not (type(value) is wanted or (wanted is float and type(value) is int)):
            problems.append(f"{name}: got {value!r}, needs to be {TYPE_NAMES[wanted]}")
    return problems


def range_problems(fields: Mapping[str, Any]) -> list[str]:
    """Says which fields hold a value that no run can use.

    Args:
        fields: dotted names and their values, of the right types.

    Example:
        >>> range_problems({"lora.rank": 0})
        ['lora.rank: got 0, needs to be at least 1']
    """
    problems = [
        f"{name}: got {fields[name]!r}, needs to be {rule.needs}"
        for name, rule in _RULES.items()
        if name in fields and not rule.holds(fields[name])
    ]
    return problems or _combination_problems(fields)


def _combination_problems(fields: Mapping[str, Any]) -> list[str]:
    """Says which fields, each fine by itself, exclude one another."""
    problems = _length_problems(fields)
    name = fields.get("data.name")
    if fields.get("data.mixture"):
        problems += _mixture_problems(fields)
    elif "data.path" in fields and not fields["data.path"]:
        if not name:
            problems.append(f"data.path: got '', needs to be {_NOT_EMPTY.needs}, or set data.name")
        elif not sets.SETS[name].hub:
            problems.append(f"data.path: got '', needs to be where you have {name}: {_NO_HUB}")
    if name and fields.get("data.format", "auto") != "auto":
        problems.append(
            f"data.format: got {fields['data.format']!r}, needs to be auto: data.name={name!r} "
            "says how the records are read"
        )
    if fields.get("eval.mmlu_solved") and not fields.get("eval.mmlu"):
        problems.append("eval.mmlu: got '', needs the questions to ask behind eval.mmlu_solved")
    if fields.get("data.group_by_length") and fields.get("data.packing"):
        problems.append(
            "data.group_by_length: got True with data.packing=True, needs data.packing=False: "
            "packed sequences are full, and all of the same length"
        )
    return problems


def _mixture_problems(fields: Mapping[str, Any]) -> list[str]:
    problems = [
        f"data.{name}: got {fields[f'data.{name}']!r}, needs to be empty beside data.mixture"
        for name in ("name", "path")
        if fields.get(f"data.{name}")
    ]
    try:
        mixture.parse_mixture(fields["data.mixture"])
    except errors.ConfigError as error:
        problems.append(f"data.mixture: {error}")
    return problems


def _length_problems(fields: Mapping[str, Any]) -> list[str]:
    source, target = (fields.get(f"data.{name}_max_len", 0) for name in ("source", "target"))
    max_len = fields.get("data.max_len", source + target)
    problems = []
    if source and source + max(target, 2) > max_len:
        problems.append(
            f"data.max_len: got {max_len}, needs to be at least {source + max(target, 2)}: the sum "
            f"of data.source_max_len={source} and data.target_max_len={target} (at least 2)"
        )
    if fields.get("data.paper_exact"):
        name, train_on = fields.get("data.name"), fields.get("data.train_on")
        if not (source and target):
            problems.append(
                "data.paper_exact: got True, needs data.source_max_len and data.target_max_len "
                "(in the paper's code 1024 and 256, for Guanaco 16 and 512)"
            )
        if not (name and sets.SETS[name].literal) or fields.get("data.chat_format") != "auto":
            literal = ", ".join(key for key, value in sets.SETS.items() if value.literal)
            problems.append(
                f"data.paper_exact: got True, needs data.name to be one of {literal}, and "
                "data.chat_format=auto"
            )
        elif sets.SETS[name].train_on == "all" and train_on == "assistant":
            problems.append(
                f"data.paper_exact: got True with data.train_on={train_on!r}, needs auto: the "
                f"paper's code trains on the whole dialogues of {name}"
            )
    return problems


def raise_if_any(what: str, problems: Iterable[str]) -> None:
    """Raises one `ConfigError` that lists all problems, if there are any.

    Args:
        what: what has the problems, to begin the message with.
        problems: one sentence each.

    Raises:
        ConfigError: there is at least one problem.

    Example:
        >>> raise_if_any("run.json", [])
    """
    if lines := [f"\n  {problem}" for problem in problems]:
        raise errors.ConfigError(f"{what} cannot be used:" + "".join(lines))
