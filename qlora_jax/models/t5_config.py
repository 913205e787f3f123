"""The shape of an encoder-decoder of the T5 family, read from a Hugging Face `config.json`.

T5 1.0 (`t5-small`, ...), T5 1.1, FLAN-T5 and mT5 are one architecture with two switches: the MLP
(ReLU, or gated GELU from 1.1 on) and the output head (the scaled embedding, or one of its own).
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from qlora_jax.errors import WeightsError

MODEL_TYPES = ("t5", "mt5")
# `feed_forward_proj`: the activation, and whether a second product gates it.
_MLPS = {
    "relu": ("relu", False),
    "gelu": ("gelu", False),
    "gated-relu": ("relu", True),
    "gated-gelu": ("gelu_pytorch_tanh", True),
    "gated-silu": ("silu", True),
}
_MT5 = {
    "vocab_size": 250112,
    "d_ff": 1024,
    "num_layers": 8,
    "num_heads": 6,
    "feed_forward_proj": "gated-gelu",
}


@dataclasses.dataclass(frozen=True)
class T5Config:
    """Sizes and variants of one encoder-decoder; names as in Hugging Face's `config.json`.

    Attributes:
      vocab_size: rows of the embedding.
      d_model: width of the residual stream.
      d_kv: size of one head.
      d_ff: width of the MLP.
      num_heads: of every attention.
      num_layers: encoder layers.
      num_decoder_layers: decoder layers.
      relative_attention_num_buckets: rows of the table of the position bias.
      relative_attention_max_distance: from this distance on all share a bucket.
      layer_norm_epsilon: added to the mean square in every norm.
      activation: of the MLP: a key of `mlp.ACTIVATIONS`.
      is_gated_act: whether the MLP has a second product that gates the first.
      tie_word_embeddings: the output head is the embedding.
      scale_decoder_outputs: the head's input is divided by sqrt(d_model), as T5 1.0 does.
      decoder_start_token_id: what a target begins with.
      model_type: "t5" or "mt5".
    """

    vocab_size: int
    d_model: int
    d_kv: int
    d_ff: int
    num_heads: int
    num_layers: int
    num_decoder_layers: int
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    layer_norm_epsilon: float = 1e-6
    activation: str = "gelu_pytorch_tanh"
    is_gated_act: bool = True
    tie_word_embeddings: bool = False
    scale_decoder_outputs: bool = False
    decoder_start_token_id: int = 0
    model_type: str = "t5"

    @classmethod
    def from_hf(
        cls, config: Mapping[str, Any], *, tie_word_embeddings: bool | None = None
    ) -> "T5Config":
        """Reads the dict of a Hugging Face `config.json`.

        Args:
          config: the parsed JSON.
          tie_word_embeddings: whether the weights have no `lm_head.weight`, where that is known;
            transformers 5 writes "tied" for all models, also for those that are not.

        Raises:
          WeightsError: the family or the activation is not supported, or a size is no number.

        >>> T5Config.from_hf({"model_type": "t5", "d_model": 8, "tie_word_embeddings": False,
        ...     "feed_forward_proj": "gated-gelu"}).is_gated_act
        True
        """
        model_type = config.get("model_type")
        if model_type not in MODEL_TYPES:
            raise WeightsError(
                f"config.json has model_type {model_type!r}, which is no encoder-decoder that is "
                f"supported ({', '.join(MODEL_TYPES)})."
            )
        # What a config.json that leaves a key out means by it.
        values = {
            "vocab_size": 32128,
            "d_model": 512,
            "d_kv": 64,
            "d_ff": 2048,
            "num_layers": 6,
            "num_heads": 8,
            "relative_attention_num_buckets": 32,
            "relative_attention_max_distance": 128,
            "feed_forward_proj": "relu",
            **(_MT5 if model_type == "mt5" else {}),
            **{key: value for key, value in config.items() if value is not None},
        }
        values.setdefault("num_decoder_layers", values["num_layers"])
        sizes = {
            field.name: values[field.name]
            for field in dataclasses.fields(cls)
            if field.type is int and field.name in values
        }
        for key, value in sizes.items():
            if not isinstance(value, int):
                raise WeightsError(f"config.json has {key} {value!r}, which must be a whole number")
        if (kind := values["feed_forward_proj"]) not in _MLPS:
            raise WeightsError(
                f"config.json has feed_forward_proj {kind!r}; supported: {', '.join(_MLPS)}."
            )
        activation, gated = _MLPS[kind]
        said_tied = values.get("tie_word_embeddings") is not False
        scaled = values.get("scale_decoder_outputs", said_tied) and model_type == "t5"
        return cls(
            **sizes,
            layer_norm_epsilon=float(values.get("layer_norm_epsilon", 1e-6)),
            activation=activation,
            is_gated_act=gated,
            tie_word_embeddings=said_tied if tie_word_embeddings is None else tie_word_embeddings,
            scale_decoder_outputs=bool(scaled),
            model_type=model_type,
        )
