"""The names of a T5's tensors in Hugging Face's files, and their paths in the model.

`encoder.block.3.layer.0.SelfAttention.q.weight` is layer 3 of `encoder/layers/self_attn/q/kernel`.
A block's MLP is its layer 1 in the encoder, and 2 in the decoder, where 1 is cross-attention.
"""

import re

# What a block's `layer.<index>` is, for encoder and decoder.
_PARTS = {"encoder": ("self_attn", "mlp"), "decoder": ("self_attn", "cross_attn", "mlp")}
_MODULES = {"self_attn": "SelfAttention", "cross_attn": "EncDecAttention", "mlp": "DenseReluDense"}
_BLOCK = re.compile(r"(encoder|decoder)\.block\.(\d+)\.layer\.(\d)\.(\w+)(?:\.(\w+))?\.weight")
_PATH = re.compile(r"(encoder|decoder)/layers/(self_attn|cross_attn|mlp)(?:_norm|/(\w+))/\w+")
_BIAS = "{}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
_TOP = {
    "shared/embedding": "shared.weight",
    "lm_head/kernel": "lm_head.weight",
    **{
        f"{stack}/{path}": name.format(stack)
        for stack in _PARTS
        for path, name in (
            ("relative_attention_bias/embedding", _BIAS),
            ("final_layer_norm/scale", "{}.final_layer_norm.weight"),
        )
    },
}
_TOP_NAMES = {name: path for path, name in _TOP.items()}
# Copies of the shared embedding, and a table that old files have and no one reads.
IGNORED = re.compile(
    r"(encoder|decoder)\.embed_tokens\.weight"
    r"|decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight"
)


def find_place(name: str) -> tuple[str, int | None] | None:
    """The path in the model, and the layer, of a tensor; None for a name no T5 has.

    >>> find_place("decoder.block.3.layer.2.DenseReluDense.wi_0.weight")
    ('decoder/layers/mlp/wi_0/kernel', 3)
    >>> find_place("decoder.block.3.layer.1.layer_norm.weight")
    ('decoder/layers/cross_attn_norm/scale', 3)
    >>> find_place("shared.weight")
    ('shared/embedding', None)
    """
    if name in _TOP_NAMES:
        return _TOP_NAMES[name], None
    match = _BLOCK.fullmatch(name)
    if not match or int(match[3]) >= len(_PARTS[match[1]]):
        return None
    stack, block, index, module, leaf = match.groups()
    part = _PARTS[stack][int(index)]
    if module == "layer_norm" and leaf is None:
        return f"{stack}/layers/{part}_norm/scale", int(block)
    if module == _MODULES[part] and leaf is not None:
        return f"{stack}/layers/{part}/{leaf}/kernel", int(block)
    return None


def place_name(path: str, layer: int | None) -> str | None:
    """The name of what is at a path, the inverse of `find_place`; None where no T5 has the path.

    >>> place_name("encoder/layers/mlp/wo/kernel", 0)
    'encoder.block.0.layer.1.DenseReluDense.wo.weight'
    """
    if layer is None:
        return _TOP.get(path)
    match = _PATH.fullmatch(path)
    if not match or match[2] not in _PARTS[match[1]]:
        return None
    stack, part, leaf = match.groups()
    prefix = f"{stack}.block.{layer}.layer.{_PARTS[stack].index(part)}"
    return f"{prefix}.{_MODULES[part]}.{leaf}.weight" if leaf else f"{prefix}.layer_norm.weight"
