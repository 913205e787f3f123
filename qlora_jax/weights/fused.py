"""Families that keep several projections in one tensor.

Phi-3 writes the rows of q, k and v one after the other into `qkv_proj`, and those of gate and up
into `gate_up_proj`. GPT-NeoX writes the rows of a head's q, k and v, then those of the next head,
into `query_key_value`. In the model they are projections of their own, as in all other families:
each has its own scales in 4 bits and its own adapter, and a `where` that names `q_proj` means it.

So a tensor of a file is split when its header is read: its pieces, called "qkv_proj[0]" and so on,
are runs of bytes in the file, and each is read alone.
"""

import re
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from qlora_jax.models.config import LlamaConfig

# Keys of `names.NAMINGS`.
FUSED_NAMINGS = ("phi3", "gpt_neox", "gguf_phi3")
_PIECE = re.compile(r"(.+)\[(\d+)\]")


class Fused(NamedTuple):
    """How the rows of several projections lie in one tensor.

    Attributes:
      groups: how often the pieces follow each other.
      sizes: rows of each piece in one group.
    """

    groups: int
    sizes: tuple[int, ...]

    @property
    def rows(self) -> int:
        """Of the whole tensor."""
        return self.groups * sum(self.sizes)

    def piece_rows(self, index: int) -> int:
        """Of one piece."""
        return self.groups * self.sizes[index]

    def split(self, whole: np.ndarray) -> list[np.ndarray]:
        """The pieces of an array whose first axis are the rows.

        >>> [piece.tolist() for piece in Fused(2, (1, 2)).split(np.arange(6))]
        [[0, 3], [1, 2, 4, 5]]
        """
        grouped = whole.reshape(self.groups, sum(self.sizes), *whole.shape[1:])
        cuts = np.cumsum(self.sizes)[:-1]
        pieces = np.split(grouped, cuts, axis=1)
        return [piece.reshape(-1, *whole.shape[1:]) for piece in pieces]

    def join(self, pieces: list[np.ndarray]) -> np.ndarray:
        """The inverse of `split`."""
        grouped = [
            piece.reshape(self.groups, size, *piece.shape[1:])
            for piece, size in zip(pieces, self.sizes, strict=True)
        ]
        return np.concatenate(grouped, axis=1).reshape(self.rows, *pieces[0].shape[1:])


def fused_modules(config: LlamaConfig) -> dict[str, Fused]:
    """The modules within a layer that are several, by the last parts of their names in files.

    Args:
      config: the model's shape.

    Returns:
      Names of Hugging Face and of GGUF; empty for most families.
    """
    head_dim, heads = config.head_dim, config.num_attention_heads
    if config.model_type == "gpt_neox":
        return {"attention.query_key_value": Fused(heads, (head_dim,) * 3)}
    if config.model_type != "phi3":
        return {}
    keys = config.num_key_value_heads * head_dim
    qkv = Fused(1, (heads * head_dim, keys, keys))
    gate_up = Fused(1, (config.intermediate_size,) * 2)
    return {
        "self_attn.qkv_proj": qkv,
        "mlp.gate_up_proj": gate_up,
        "attn_qkv": qkv,
        "ffn_up": gate_up,
    }


def find_fused(name: str, modules: Mapping[str, Fused]) -> Fused | None:
    """How a tensor or module of a layer is made up; None: it is one.

    >>> find_fused("model.layers.0.self_attn.qkv_proj.weight", {"self_attn.qkv_proj": "three"})
    'three'
    """
    module = re.sub(r"\.(?:weight|bias)$", "", name)
    for ending, fused in modules.items():
        if module.endswith(f".{ending}"):
            return fused
    return None


def piece_name(name: str, index: int) -> str:
    """What a piece of a tensor is called.

    >>> piece_name("model.layers.0.mlp.gate_up_proj.weight", 1)
    'model.layers.0.mlp.gate_up_proj[1].weight'
    """
    module, _, leaf = name.rpartition(".")
    return f"{module}[{index}].{leaf}"


def whole_module(module: str) -> tuple[str, int | None]:
    """The module that a piece belongs to, and which piece it is; None where it is a whole one.

    >>> whole_module("model.layers.0.mlp.gate_up_proj[1]"), whole_module("lm_head")
    (('model.layers.0.mlp.gate_up_proj', 1), ('lm_head', None))
    """
    match = _PIECE.fullmatch(module)
    return (match[1], int(match[2])) if match else (module, None)
