"""The two kinds of models: decoders (`Llama` and its relatives) and encoder-decoders (`T5`).

Whatever loads, plans or packs models asks here for the shape and the module that a `config.json`
stands for, and treats both alike from then on.
"""

from collections.abc import Collection, Mapping
from typing import Any

from flax import nnx

from qlora_jax.models.config import LlamaConfig
from qlora_jax.models.llama import Llama
from qlora_jax.models.t5 import T5
from qlora_jax.models.t5_config import MODEL_TYPES, T5Config

Shape = LlamaConfig | T5Config
Model = Llama | T5

# The output head in a file, by Hugging Face's name and by its path in the model.
_HEADS = {"lm_head.weight", "lm_head/kernel"}


def read_shape(config: Mapping[str, Any], names: Collection[str] | None = None) -> Shape:
    """Reads the dict of a Hugging Face `config.json`.

    Args:
      config: the parsed JSON.
      names: of the tensors that belong to it, where they are known.

    Raises:
      WeightsError: the family or a part of it is not supported, or sizes are missing.

    >>> type(read_shape({"model_type": "mt5"})).__name__
    'T5Config'
    """
    if config.get("model_type") not in MODEL_TYPES:
        return LlamaConfig.from_hf(config)
    return T5Config.from_hf(
        config, tie_word_embeddings=None if names is None else _HEADS.isdisjoint(names)
    )


def abstract_model(shape: Shape, **options: Any) -> Model:
    """A model without values.

    Args:
      shape: of the model.
      **options: `dtype`, `param_dtype`, `remat` and `sequence_chunk` of `Llama` and `T5`.

    Raises:
      ConfigError: an option is not for this kind of model.
    """
    kind = T5 if isinstance(shape, T5Config) else Llama
    return nnx.eval_shape(lambda: kind(shape, rngs=nnx.Rngs(0), **options))
