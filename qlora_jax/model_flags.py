"""The flags that name a model, shared by the scripts that ask one something.

    _MODEL = model_flags.define()

    def main():
        model, tokenizer = _MODEL.load()

A model is the newest adapter of a run on its base (`--workdir`), or a model as it is (`--model`),
or an adapter of PEFT on it (`--adapter`).
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
from absl import flags
from flax import nnx

from qlora_jax.data.tokenizer import Tokenizer
from qlora_jax.errors import ConfigError
from qlora_jax.loading import load_model
from qlora_jax.peft import load_adapter
from qlora_jax.training import load_trained
from qlora_jax.training.building import choose_compute_dtype

# --help lists a flag under the module that defines it: let that be the script that calls.
flags.disclaim_key_flags()

_WORKDIR = "directory of a run: its base and newest adapter"
_MODEL = "a model: a folder, a GGUF file, package:<name>/<file>, or a name on the hub"
_ADAPTER = "with --model: the folder of a PEFT adapter"


@dataclasses.dataclass(frozen=True)
class ModelFlags:
    """What `define` has defined."""

    workdir: flags.FlagHolder
    model: flags.FlagHolder
    adapter: flags.FlagHolder
    quant: flags.FlagHolder

    @property
    def quant_type(self) -> str | None:
        """How the weights of `--model` are held; None: as they are."""
        return None if self.quant.value == "none" else self.quant.value

    @property
    def name(self) -> str:
        """The model, as the user called it."""
        return self.workdir.value or " + ".join(
            filter(None, (self.model.value, self.adapter.value))
        )

    def load(self) -> tuple[nnx.Module, Tokenizer]:
        """Loads the model and its tokenizer.

        Raises:
            ConfigError: neither or both of `--workdir` and `--model` are given, or flags that do
                not go together.
            UserError: see `load_trained`, `load_model` and `load_adapter`.
        """
        if (self.workdir.value is None) == (self.model.value is None):
            raise ConfigError(
                "give either --workdir=runs/name (with adapter) or --model=path (without)"
            )
        if self.workdir.value is not None:
            if self.adapter.value is not None:
                raise ConfigError(
                    "--adapter goes onto a --model; a --workdir has an adapter of its own. Give "
                    "--model=path, the base of the adapter, instead"
                )
            return load_trained(self.workdir.value)
        dtype, _ = choose_compute_dtype("auto", jax.devices()[0])
        model, tokenizer = load_model(self.model.value, quant_type=self.quant_type, dtype=dtype)
        if self.adapter.value is not None:
            model = load_adapter(model, self.adapter.value)
        return model, tokenizer

    def engine_arguments(self) -> dict[str, Any]:
        """What `chat_models.load_engine` takes of flags that were defined with `several`."""
        return {
            "workdirs": self.workdir.value,
            "model": self.model.value,
            "adapters": self.adapter.value,
            "quant_type": self.quant_type,
        }


def define(*, several: bool = False) -> ModelFlags:
    """Defines `--workdir`, `--model`, `--adapter` and `--quant_type`.

    Args:
        several: whether `--workdir` and `--adapter` can be repeated, each with a name.
    """
    if several:
        workdir = flags.DEFINE_multi_string(
            "workdir", [], f"{_WORKDIR}; several, of one base: NAME=DIR"
        )
        adapter = flags.DEFINE_multi_string(
            "adapter", [], f"{_ADAPTER}, or NAME=FOLDER; can be repeated"
        )
    else:
        workdir = flags.DEFINE_string("workdir", None, _WORKDIR)
        adapter = flags.DEFINE_string("adapter", None, _ADAPTER)
    return ModelFlags(
        workdir,
        flags.DEFINE_string("model", None, _MODEL),
        adapter,
        flags.DEFINE_enum(
            "quant_type",
            "nf4",
            ["nf4", "fp4", "int4", "none"],
            "with --model: how to hold the weights",
        ),
    )
