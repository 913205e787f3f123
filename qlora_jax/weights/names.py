"""The names of tensors: Hugging Face and GGUF on one side, paths in the NNX model on the other.

A `Slot` says where a tensor of a file goes: a path in the model, and for the stacked layers the
index on the leading axis. Models have the same paths whatever their family; what files call these
is their `Naming`. The two common ones, "hf" and "gguf", come from one table, so they cannot drift
apart; other families say in what they differ.

Some families keep several projections in one tensor. A name with an index in brackets,
"self_attn.qkv_proj[1]", is that piece of it (see `weights.fused`).
"""

import re
from collections.abc import Mapping
from typing import Literal, NamedTuple

from qlora_jax.errors import WeightsError
from qlora_jax.weights import t5_names

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
    ("pre_feedforward_layernorm", "pre_feedforward_layernorm", "pre_ffw_norm"),
    ("post_feedforward_layernorm", "post_feedforward_layernorm", "post_ffw_norm"),
)
_TOP_MODULES = (
    ("embed_tokens", "model.embed_tokens", "token_embd"),
    ("norm", "model.norm", "output_norm"),
    ("lm_head", "lm_head", "output"),
)


class Naming(NamedTuple):
    """What files call the modules of a model.

    Attributes:
      layers: what stands before a layer's index.
      layer_modules: names within a layer by path.
      top_modules: names of what is in no layer, by path.
      ignored: tensors that carry nothing but what can be computed, and those of picture encoders.
      aliases: beginnings of names that some files have, and what they stand for.
    """

    layers: str
    layer_modules: Mapping[str, str]
    top_modules: Mapping[str, str]
    ignored: re.Pattern[str]
    aliases: tuple[tuple[str, str], ...] = ()


_HF = Naming(
    "model.layers",
    {row[0]: row[1] for row in _LAYER_MODULES},
    {row[0]: row[1] for row in _TOP_MODULES},
    re.compile(
        r"(?:.*\.)?rotary_emb\.inv_freq|(?:model\.)?(?:vision_tower|multi_modal_projector)\..*"
    ),
    (
        ("language_model.model.", "model."),
        ("model.language_model.", "model."),
        ("language_model.lm_head.", "lm_head."),
    ),
)
_GGUF = Naming(
    "blk",
    {row[0]: row[2] for row in _LAYER_MODULES},
    {row[0]: row[2] for row in _TOP_MODULES},
    re.compile(r"rope_freqs\.weight"),
)


def _pieces(module: str, *paths: str) -> dict[str, str]:
    return {path: f"{module}[{index}]" for index, path in enumerate(paths)}


_QKV = ("self_attn/q_proj", "self_attn/k_proj", "self_attn/v_proj")
_GATE_UP = ("mlp/gate_proj", "mlp/up_proj")
NAMINGS: dict[str, Naming] = {
    "hf": _HF,
    "phi3": _HF._replace(
        layer_modules={
            **_HF.layer_modules,
            **_pieces("self_attn.qkv_proj", *_QKV),
            **_pieces("mlp.gate_up_proj", *_GATE_UP),
        }
    ),
    "opt": Naming(
        "model.decoder.layers",
        {
            **{path: path.replace("/", ".") for path in _QKV},
            "self_attn/o_proj": "self_attn.out_proj",
            "mlp/up_proj": "fc1",
            "mlp/down_proj": "fc2",
            "input_layernorm": "self_attn_layer_norm",
            "post_attention_layernorm": "final_layer_norm",
        },
        {
            "embed_tokens": "model.decoder.embed_tokens",
            "embed_positions": "model.decoder.embed_positions",
            "norm": "model.decoder.final_layer_norm",
            "lm_head": "lm_head",
        },
        re.compile(r"$^"),
        (("decoder.", "model.decoder."),),
    ),
    "gpt_neox": Naming(
        "gpt_neox.layers",
        {
            **_pieces("attention.query_key_value", *_QKV),
            "self_attn/o_proj": "attention.dense",
            "mlp/up_proj": "mlp.dense_h_to_4h",
            "mlp/down_proj": "mlp.dense_4h_to_h",
            "input_layernorm": "input_layernorm",
            "post_attention_layernorm": "post_attention_layernorm",
        },
        {
            "embed_tokens": "gpt_neox.embed_in",
            "norm": "gpt_neox.final_layer_norm",
            "lm_head": "embed_out",
        },
        re.compile(r"gpt_neox\..*attention\.(?:bias|masked_bias|rotary_emb\.inv_freq)"),
        (("lm_head.", "embed_out."),),
    ),
    "gguf": _GGUF,
    "gguf_gemma": _GGUF._replace(
        layer_modules={
            **_GGUF.layer_modules,
            "post_attention_layernorm": "post_attention_norm",
            "pre_feedforward_layernorm": "ffn_norm",
        }
    ),
    "gguf_phi3": _GGUF._replace(
        layer_modules={
            **_GGUF.layer_modules,
            **_pieces("attn_qkv", *_QKV),
            **_pieces("ffn_up", *_GATE_UP),
        }
    ),
}
_OF_FAMILY = {
    "hf": {"phi3": "phi3", "opt": "opt", "gpt_neox": "gpt_neox", "t5": "t5", "mt5": "t5"},
    "gguf": {
        "gemma2": "gguf_gemma",
        "gemma3": "gguf_gemma",
        "gemma3_text": "gguf_gemma",
        "phi3": "gguf_phi3",
    },
}
_TENSOR = re.compile(r"(.+)\.(weight|bias)")
_LAYER_TENSOR = re.compile(r"\.(\d+)\.(.+)\.(weight|bias)")


def naming_of(family: str | None, style: Style) -> str:
    """How files of a format name the tensors of a family.

    Args:
      family: `model_type` of a config.json, or GGUF's architecture.
      style: the format.

    Returns:
      A key of `NAMINGS`, or "t5", whose names are in `t5_names`.

    Raises:
      WeightsError: the file says something else than a name.

    Example:
      >>> naming_of("opt", "hf"), naming_of("llama", "gguf")
      ('opt', 'gguf')
    """
    if family is not None and not isinstance(family, str):
        where = "model_type in config.json" if style == "hf" else "general.architecture"
        raise WeightsError(f"{where} is {family!r}, which must be a name. Download it again.")
    return _OF_FAMILY[style].get(family, style)


class Slot(NamedTuple):
    """A place in the model: `path` to an array, and `layer` on its leading axis (or None)."""

    path: str
    layer: int | None


def find_slot(name: str, naming: str) -> Slot | None:
    """Finds where a tensor of a file goes in the model.

    Args:
      name: the tensor's name in the file.
      naming: how the file names tensors, see `naming_of`.

    Returns:
      The slot, or None for a name that no model of the naming has.

    Example:
      >>> find_slot("model.layers.3.self_attn.q_proj.weight", "hf")
      Slot(path='layers/self_attn/q_proj/kernel', layer=3)
      >>> find_slot("output_norm.weight", "gguf")
      Slot(path='norm/scale', layer=None)
      >>> find_slot("model.vision.patch.weight", "hf") is None
      True
    """
    if naming == "t5":
        place = t5_names.find_place(name)
        return place and Slot(*place)
    names = NAMINGS[naming]
    for alias, beginning in names.aliases:
        if name.startswith(alias):
            name = beginning + name.removeprefix(alias)
    if name.startswith(names.layers):
        if match := _LAYER_TENSOR.fullmatch(name.removeprefix(names.layers)):
            index, module, leaf = match.groups()
            for path, written in names.layer_modules.items():
                if written == module:
                    return Slot(f"layers/{path}/{_leaf(path, leaf)}", int(index))
    elif match := _TENSOR.fullmatch(name):
        module, leaf = match.groups()
        for path, written in names.top_modules.items():
            if written == module:
                return Slot(f"{path}/{_leaf(path, leaf)}", None)
    return None


def tensor_name(slot: Slot, naming: str) -> str:
    """Gives the name that a file has for a slot, the inverse of `find_slot`.

    Args:
      slot: a place in the model.
      naming: how the file names tensors, see `naming_of`.

    Returns:
      The name; a path that is not in the table comes back with dots, to be readable in a message.

    Example:
      >>> tensor_name(Slot("layers/mlp/down_proj/kernel", 0), "gguf")
      'blk.0.ffn_down.weight'
      >>> tensor_name(Slot("layers/self_attn/k_proj/kernel", 2), "phi3")
      'model.layers.2.self_attn.qkv_proj[1].weight'
    """
    if naming == "t5":
        return t5_names.place_name(*slot) or slot.path.replace("/", ".")
    names = NAMINGS[naming]
    module, _, leaf = slot.path.rpartition("/")
    suffix = "bias" if leaf == "bias" else "weight"
    written = names.top_modules.get(module)
    if slot.layer is not None:
        written = names.layer_modules.get(module.removeprefix("layers/"))
        written = written and f"{names.layers}.{slot.layer}.{written}"
    return f"{written}.{suffix}" if written else slot.path.replace("/", ".")


def is_ignored(name: str, naming: str) -> bool:
    """Says whether a tensor carries nothing that the model does not compute itself.

    Args:
      name: the tensor's name in the file.
      naming: how the file names tensors, see `naming_of`.

    Returns:
      True for rotary frequencies, for picture encoders beside a language model, and for copies of
      T5's embedding.

    Example:
      >>> is_ignored("model.layers.0.self_attn.rotary_emb.inv_freq", "hf")
      True
    """
    ignored = t5_names.IGNORED if naming == "t5" else NAMINGS[naming].ignored
    return ignored.fullmatch(name) is not None


def _leaf(module: str, leaf: str) -> str:
    """Returns Flax's name for a weight: kernel, embedding or scale."""
    if leaf == "bias":
        return "bias"
    if module in ("embed_tokens", "embed_positions"):
        return "embedding"
    return "scale" if module.endswith("norm") else "kernel"
