"""What an `adapter_config.json` of PEFT says, read strictly.

PEFT's file has some forty keys. A few choose the layers and their scaling (`PeftConfig`), some only
say how an adapter came to be, and the rest would change what the model computes. Those of the last
kind are refused by name, and so is any key that is not known here, unless it is switched off: an
adapter that loads computes what it computes in PEFT.
"""

import dataclasses
import math
import pathlib
import re
from collections.abc import Mapping
from typing import Any

from qlora_jax.errors import WeightsError

_MERGE = (
    "In PEFT, fold the adapter into its base with merge_and_unload(), save that model, and give it "
    "as the model."
)
# Keys that mean something else than LoRA or DoRA when they are set: what it is, and the remedy.
_REFUSED = {
    "modules_to_save": ("whole layers beside LoRA (modules_to_save)", _MERGE),
    "trainable_token_indices": ("new token embeddings (trainable_token_indices)", _MERGE),
    "lora_bias": ("a bias on B (lora_bias)", _MERGE),
    "target_parameters": ("LoRA on bare parameters (target_parameters)", _MERGE),
    "use_qalora": ("QALoRA (use_qalora)", _MERGE),
    "use_bdlora": ("block-diagonal LoRA (use_bdlora)", _MERGE),
    "kasa_config": ("KaSA (kasa_config)", _MERGE),
    "monteclora_config": ("MonteCLoRA (monteclora_config)", _MERGE),
    "layer_replication": ("repeated layers (layer_replication)", _MERGE),
    "alora_invocation_tokens": (
        "Activated LoRA (alora_invocation_tokens)",
        "It cannot be merged either; give an adapter that was trained without it.",
    ),
    "arrow_config": ("Arrow routing (arrow_config)", "Give one plain LoRA adapter."),
    "fan_in_fan_out": (
        "layers stored transposed (fan_in_fan_out, for GPT-2's Conv1D)",
        "Train it again with fan_in_fan_out=False on a model with linear layers.",
    ),
}
# Keys that say how an adapter was made, or are read below.
_KNOWN = frozenset(
    "peft_type task_type r lora_alpha use_rslora use_dora lora_dropout target_modules "
    "exclude_modules layers_to_transform layers_pattern rank_pattern alpha_pattern bias "
    "init_lora_weights base_model_name_or_path revision inference_mode auto_mapping peft_version "
    "megatron_config megatron_core loftq_config eva_config corda_config lora_ga_config "
    "qalora_group_size ensure_weight_tying".split()
)
# Other initialisations take something away from the base, to which the adapter then belongs.
_PLAIN_INITS = (True, False, None, "gaussian", "orthogonal", "eva")
_LONGEST = 4096
_PLAIN = re.compile(r"[\w.-]*+")


@dataclasses.dataclass(frozen=True)
class PeftConfig:
    """The part of an `adapter_config.json` that decides what is computed.

    Attributes:
      rank: r of the layers that no pattern names.
      alpha: their lora_alpha.
      use_rslora: whether alpha is divided by sqrt(rank) rather than rank.
      use_dora: whether there are magnitudes (arXiv 2402.09353).
      dropout: on the adapters' input in training.
      target_modules: names or endings of names; a string is a regular expression or "all-linear".
      exclude_modules: the same; these layers have no adapter.
      layers_to_transform: indices of the layers that have one; None: all.
      layers_pattern: names of the list of layers; empty: any.
      rank_pattern: r by regular expressions over the ends of names, the first that matches.
      alpha_pattern: lora_alpha in the same way.
    """

    rank: int
    alpha: float
    use_rslora: bool
    dropout: float
    target_modules: str | tuple[str, ...]
    exclude_modules: str | tuple[str, ...] = ()
    layers_to_transform: tuple[int, ...] | None = None
    layers_pattern: tuple[str, ...] = ()
    rank_pattern: Mapping[str, int] = dataclasses.field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = dataclasses.field(default_factory=dict)
    use_dora: bool = False

    @classmethod
    def from_json(cls, values: Mapping[str, Any], path: pathlib.Path) -> "PeftConfig":
        """Reads the file's contents.

        Args:
          values: the JSON object.
          path: of the file, for messages.

        Returns:
          The configuration.

        Raises:
          WeightsError: it is no plain LoRA adapter of a causal language model, or a value is not of
            the kind that PEFT writes.

        Example:
          >>> values = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ["q_proj"]}
          >>> PeftConfig.from_json(values, pathlib.Path("adapter_config.json")).rank
          8
        """
        _refuse_other_methods(values, path)
        one = _Reader(values, path)
        layers = values.get("layers_to_transform")
        return cls(
            rank=one.rank("r", values.get("r")),
            alpha=one.number("lora_alpha", values.get("lora_alpha")),
            use_rslora=one.flag("use_rslora"),
            dropout=one.dropout(),
            target_modules=one.names("target_modules", required=True),
            exclude_modules=one.names("exclude_modules"),
            layers_to_transform=None if layers in (None, []) else one.layers(layers),
            layers_pattern=one.patterns(),
            rank_pattern=one.pattern("rank_pattern", one.rank),
            alpha_pattern=one.pattern("alpha_pattern", one.number),
            use_dora=one.flag("use_dora"),
        )

    def targets(self, module: str) -> bool:
        """Whether a linear layer has an adapter; as `peft.tuners.tuners_utils` decides it.

        Args:
          module: its name in the Hugging Face model, "model.layers.0.self_attn.q_proj".

        Example:
          >>> config = PeftConfig(8, 16.0, False, 0.0, ("q_proj",), layers_to_transform=(1,))
          >>> [config.targets(f"model.layers.{i}.self_attn.q_proj") for i in range(3)]
          [False, True, False]
        """
        if _names_it(self.exclude_modules, module):
            return False
        if isinstance(self.target_modules, str):
            if self.target_modules.lower() == "all-linear":
                return module != "lm_head"
            return _names_it(self.target_modules, module)
        if not _names_it(self.target_modules, module):
            return False
        if self.layers_to_transform is None or module in self.target_modules:
            return True
        for pattern in self.layers_pattern or ("[^.]*",):
            if found := re.match(_of_layers(pattern), module):
                return int(found[found.lastindex]) in self.layers_to_transform
        return False

    def expressions(self) -> list[tuple[str, str]]:
        """The regular expressions that are used, save plain names, and how; see `re`.

        Example:
          >>> PeftConfig(8, 16.0, False, 0.0, ".*_proj", rank_pattern={"q_proj": 4}).expressions()
          [('fullmatch', '.*_proj')]
        """
        whole = [names for names in (self.target_modules, self.exclude_modules) if names]
        found = [("fullmatch", names, names) for names in whole if isinstance(names, str)]
        found += [("match", _of_layers(pattern), pattern) for pattern in self.layers_pattern]
        ends = [*self.rank_pattern, *self.alpha_pattern]
        found += [("match", _at_the_end(pattern), pattern) for pattern in ends]
        return [(how, used) for how, used, said in found if not _PLAIN.fullmatch(said)]

    def rank_of(self, module: str) -> int:
        """The rank of a layer's adapter."""
        return _first_match(self.rank_pattern, module, self.rank)

    def alpha_of(self, module: str) -> float:
        """A layer's alpha."""
        return _first_match(self.alpha_pattern, module, self.alpha)


def _refuse_other_methods(values: Mapping[str, Any], path: pathlib.Path) -> None:
    kind = values.get("peft_type")
    if kind != "LORA":
        raise WeightsError(
            f"{path} describes an adapter of the kind {kind!r} (peft_type); only 'LORA' can be "
            f"loaded. {_MERGE}"
        )
    if values.get("task_type") not in (None, "CAUSAL_LM", "SEQ_2_SEQ_LM"):
        raise WeightsError(
            f"{path} is for {values['task_type']!r} (task_type), not for 'CAUSAL_LM' or "
            "'SEQ_2_SEQ_LM', text generation. Give an adapter that was trained on a language model."
        )
    if values.get("bias", "none") != "none":
        raise WeightsError(
            f"{path} has trained biases (bias={values['bias']!r}); only bias='none' can be loaded. "
            f"{_MERGE}"
        )
    for key, (meaning, remedy) in _REFUSED.items():
        if values.get(key):
            raise WeightsError(f"{path} uses {meaning}, which cannot be loaded. {remedy}")
    init = values.get("init_lora_weights", True)
    if init not in _PLAIN_INITS:
        raise WeightsError(
            f"{path} has init_lora_weights={init!r}, which also changes the base, so that the "
            "adapter does not fit the original model. In PEFT, save it with save_pretrained(..., "
            "path_initial_model_for_weight_conversion=...), which makes a plain adapter of it."
        )
    read = _KNOWN | _REFUSED.keys()
    if unknown := [f"{k}={value!r}" for k, value in values.items() if value and k not in read]:
        raise WeightsError(
            f"{path} sets {', '.join(unknown)}, which is not "
            f"known here and may change what the adapter computes. {_MERGE}"
        )


class _Reader:
    """Reads values of one file, and says which one is wrong."""

    def __init__(self, values: Mapping[str, Any], path: pathlib.Path):
        self.values, self.path = values, path

    def wrong(self, key: str, value: Any, expected: str) -> WeightsError:
        """The error for a value."""
        return WeightsError(
            f"{self.path}: {key} is {value!r}, expected is {expected}. Save the adapter again with "
            "PEFT's save_pretrained()."
        )

    def rank(self, key: str, value: Any) -> int:
        """A positive whole number."""
        if type(value) is not int or value < 1:
            raise self.wrong(key, value, "a whole number of at least 1")
        return value

    def number(self, key: str, value: Any) -> float:
        """A finite number."""
        if type(value) not in (int, float) or not math.isfinite(value):
            raise self.wrong(key, value, "a number")
        return float(value)

    def flag(self, key: str) -> bool:
        """True or False; False when it is not there."""
        value = self.values.get(key, False)
        if type(value) is not bool:
            raise self.wrong(key, value, "true or false")
        return value

    def dropout(self) -> float:
        """A probability below 1."""
        value = self.number("lora_dropout", self.values.get("lora_dropout", 0.0))
        if not 0.0 <= value < 1.0:
            raise self.wrong("lora_dropout", value, "at least 0 and below 1")
        return value

    def names(self, key: str, required: bool = False) -> str | tuple[str, ...]:
        """A regular expression or a list of names."""
        value = self.values.get(key)
        if isinstance(value, str) and value:
            return self.expression(key, value)
        if isinstance(value, list) and all(isinstance(name, str) for name in value):
            if value or not required:
                return tuple(value)
        elif value is None and not required:
            return ()
        raise self.wrong(key, value, "a list of names or a regular expression")

    def layers(self, value: Any) -> tuple[int, ...]:
        """Indices of layers."""
        value = [value] if type(value) is int else value
        if not isinstance(value, list) or any(type(index) is not int for index in value):
            raise self.wrong("layers_to_transform", value, "a list of whole numbers")
        return tuple(value)

    def patterns(self) -> tuple[str, ...]:
        """Names of lists of layers."""
        found = self.names("layers_pattern")
        found = (found,) if isinstance(found, str) else found
        return tuple(self.expression("layers_pattern", one) for one in found)

    def pattern(self, key: str, read: Any) -> dict[str, Any]:
        """Values by regular expression."""
        value = self.values.get(key) or {}
        if not isinstance(value, dict):
            raise self.wrong(key, value, "an object of names and numbers")
        return {
            self.expression(key, name): read(f"{key}[{name!r}]", number)
            for name, number in value.items()
        }

    def expression(self, key: str, value: str) -> str:
        """A regular expression."""
        forms = {"layers_pattern": _of_layers, "rank_pattern": _at_the_end}
        used = (forms | {"alpha_pattern": _at_the_end}).get(key, str)(value)
        try:
            if len(value) > _LONGEST:
                raise re.error(f"of at most {_LONGEST} characters")
            re.compile(used)
        except (re.error, RecursionError, OverflowError) as error:
            raise self.wrong(key, value, f"a regular expression ({error})") from None
        return value


def _of_layers(pattern: str) -> str:
    return rf"(?:^|.*?\.){pattern}\.(\d+)\."


def _at_the_end(pattern: str) -> str:
    return rf"(.*\.)?({pattern})$"


def _names_it(names: str | tuple[str, ...], module: str) -> bool:
    if isinstance(names, str):
        return re.fullmatch(names, module) is not None
    return module in names or any(module.endswith(f".{name}") for name in names)


def _first_match(pattern: Mapping[str, Any], module: str, default: Any) -> Any:
    for key, value in pattern.items():
        if re.match(_at_the_end(key), module):
            return value
    return default
