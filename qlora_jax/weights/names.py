"""The names of tensors: Hugging Face and GGUF on one side, paths in the NNX model on the other.

A `Slot` says where a tensor of a file goes: a path in the model, and for the stacked layers the
index on the leading axis. Both name styles come from one table, so they cannot drift apart.
"""

import re
from typing import Literal, NamedTuple

Style = Literal["hf", "gguf"]

# (path in the model, Hugging Face name, GGUF name); the last part depends on the kind of module.
_LAYER_MODULES = (
    ("self_attn/q_proj", "self_attn.q_proj", "attn_q"),
    ("self_attn/k_proj", "self_attn.k_proj", "attn_k"),
    ("self_attn/v_proj", "self_attn.v_proj", "attn_v"),
    ("self_attn/o_proj", "self_attn.o_proj", "attn_output"),
    ("self_attn/q_norm", "self_attn.q_norm", "attn_q_norm"),
    ("self_attn/k_norm", "self_attn.k_norm", "attn_k_norm"),
    ("mlp/gate_proj", "mlp.gate_proj", "ffn_gate"),
    ("mlp/up_proj", "mlp.up_proj", "ffn_up"),
    ("mlp/down_proj", "mlp.down_proj", "ffn_down"),
    ("input_layernorm", "input_layernorm", "attn_norm"),
    ("post_attention_layernorm", "post_attention_layernorm", "ffn_norm"),
)
_TOP_MODULES = (
    ("embed_tokens", "model.embed_tokens", "token_embd"),
    ("norm", "model.norm", "output_norm"),
    ("lm_head", "lm_head", "output"),
)

# Buffers that can be computed: inv_freq of old Llama files, the llama3 factors of GGUF.
_IGNORED = {
    "hf": re.compile(r"(?:.*\.)?rotary_emb\.inv_freq"),
    "gguf": re.compile(r"rope_freqs\.weight"),
}
_LAYER = {
    "hf": re.compile(r"model\.layers\.(\d+)\.(.+)\.(weight|bias)"),
    "gguf": re.compile(r"blk\.(\d+)\.(.+)\.(weight|bias)"),
}
_TOP = re.compile(r"(.+)\.(weight|bias)")
_COLUMN = {"hf": 1, "gguf": 2}


class Slot(NamedTuple):
    """A place in the model: `path` to an array, and `layer` on its leading axis (or None)."""

    path: str
    layer: int | None


def find_slot(name: str, style: Style) -> Slot | None:
    """Finds where a tensor of a file goes in the model.

    Args:
      name: the tensor's name in the file.
      style: how the file names tensors.

    Returns:
      The slot, or None for a name no Llama-like model has.

    Example:
      >>> find_slot("model.layers.3.self_attn.q_proj.weight", "hf")
      Slot(path='layers/self_attn/q_proj/kernel', layer=3)
      >>> find_slot("output_norm.weight", "gguf")
      Slot(path='norm/scale', layer=None)
      >>> find_slot("model.vision.patch.weight", "hf") is None
      True
    """
    column = _COLUMN[style]
    if match := _LAYER[style].fullmatch(name):
        index, module, leaf = match.groups()
        for row in _LAYER_MODULES:
            if row[column] == module:
                return Slot(f"layers/{row[0]}/{_leaf(row[0], leaf)}", int(index))
    elif match := _TOP.fullmatch(name):
        module, leaf = match.groups()
        for row in _TOP_MODULES:
            if row[column] == module:
                return Slot(f"{row[0]}/{_leaf(row[0], leaf)}", None)
    return None


def tensor_name(slot: Slot, style: Style) -> str:
    """Gives the name that a file of a style has for a slot, the inverse of `find_slot`.

    Args:
      slot: a place in the model.
      style: how the file names tensors.

    Returns:
      The name; a path that is not in the table comes back with dots, to be readable in a message.

    Example:
      >>> tensor_name(Slot("layers/mlp/down_proj/kernel", 0), "gguf")
      'blk.0.ffn_down.weight'
      >>> tensor_name(Slot("embed_tokens/embedding", None), "hf")
      'model.embed_tokens.weight'
    """
    column = _COLUMN[style]
    module, _, leaf = slot.path.rpartition("/")
    suffix = "bias" if leaf == "bias" else "weight"
    if slot.layer is None:
        for row in _TOP_MODULES:
            if row[0] == module:
                return f"{row[column]}.{suffix}"
    else:
        prefix = "model.layers" if style == "hf" else "blk"
        for row in _LAYER_MODULES:
            if f"layers/{row[0]}" == module:
                return f"{prefix}.{slot.layer}.{row[column]}.{suffix}"
    return slot.path.replace("/", ".")


def is_ignored(name: str, style: Style) -> bool:
    """Says whether a tensor carries nothing that the model does not compute itself.

    Args:
      name: the tensor's name in the file.
      style: how the file names tensors.

    Returns:
      True for rotary frequencies.

    Example:
      >>> is_ignored("model.layers.0.self_attn.rotary_emb.inv_freq", "hf")
      True
    """
    return _IGNORED[style].fullmatch(name) is not None


def _leaf(module: str, leaf: str) -> str:
    """Returns Flax's name for a weight: kernel, embedding or scale."""
    if leaf == "bias":
        return "bias"
    if module == "embed_tokens":
        return "embedding"
    return "scale" if module.endswith("norm") else "kernel"
