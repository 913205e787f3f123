"""An estimate of a run's memory by arithmetic, for where nothing can be compiled.

`planning.plan` compiles the training step and reads the compiler's own plan, which is exact but
takes JAX's CUDA plugin, a few GB. Here the same parts are added up from shapes alone, in a second:

- what the step is given is exact: packed base, embeddings, norms and head, adapters, moments;
- so are the gradients (a tree like the adapters, and a second one in float32 where microbatches
  are accumulated) and the activations that are stored for the backward pass, which follow from
  the remat policy;
- what one layer needs while it is computed again and differentiated is known in kind (decoded
  weights, activations of its tokens, random bits of dropout, the mask of packed rows), but the
  compiler decides what lives at the same time. Those counts, `_PER_TOKEN`, were fitted to compiled
  plans; `docs/performance.md` has the error of the whole.

At the peak a layer is differentiated, or else the loss of a chunk of tokens.
"""

from __future__ import annotations

import dataclasses

import jax
from ml_collections import config_dict

from pallas_kernels import devices
from qlora_jax.errors import ConfigError
from qlora_jax.models.attention import implementation
from qlora_jax.models.config import LlamaConfig
from qlora_jax.models.t5_config import T5Config
from qlora_jax.optim.paged import PAGE_BYTES
from qlora_jax.placement import tree_bytes
from qlora_jax.planning import CONTEXT_BYTES, AbstractRun, abstract_run
from qlora_jax.report import dense_linears, measure
from qlora_jax.targets import GpuTarget, find_target
from qlora_jax.training.building import choose_compute_dtype, choose_remat
from qlora_jax.training.fitting import device_budget

# Bytes a token that a layer holds while it is differentiated, by remat policy, fitted to compiled
# plans: in multiples of the hidden and the intermediate size; and with dropout, whose random bits
# are partly drawn ahead, at least in multiples of the hidden size.
_PER_TOKEN = {
    "full": (10.4, 10.4, 52.4),
    "offload": (10.4, 10.4, 52.4),
    "dots": (10.4, 10.4, 52.4),
    "projections": (10.4, 8.0, 42.0),
    "none": (10.4, 10.4, 52.4),
}
_DROPOUT = 6.4


@dataclasses.dataclass(frozen=True)
class Estimate:
    """The memory of one training step on one GPU, by arithmetic.

    Attributes:
        device: name of the target.
        method: `"estimate"`, to tell it from a compiled plan.
        peak_bytes: device memory that the step needs, about.
        host_bytes: pinned memory of the host.
        budget_bytes: as of `planning.Plan`.
        verdict: as of `planning.Plan`.
        parts: bytes on the device by what they are; they add up to `peak_bytes`.
        host_parts: likewise, of `host_bytes`.
    """

    device: str
    method: str
    peak_bytes: int
    host_bytes: int
    budget_bytes: int
    verdict: str
    parts: dict[str, int]
    host_parts: dict[str, int]

    @property
    def fits(self) -> bool:
        """Whether the run can be done, if the estimate is right."""
        return self.peak_bytes <= self.budget_bytes


def estimate(config: config_dict.ConfigDict, device: str = "h100") -> Estimate:
    """Adds up what the training step of a configuration needs on a GPU.

    Args:
        config: a whole configuration, of which `planning.plan` looks at the same fields.
        device: one of `targets.TARGETS`.

    Raises:
        ConfigError: a field cannot be used, or the model is an encoder-decoder.
        TargetError: unknown device.
        UserError: the model's shape is nowhere to be found.
    """
    target = find_target(device)
    run = abstract_run(config, target)
    if isinstance(run.shape, T5Config):
        raise ConfigError(
            f"{config.model.path} is an encoder-decoder, for which there is no estimate; compile "
            'its plan, without --estimate and with pip install "qlora-jax[cuda]"'
        )
    remat = _remat(config, target)
    size = measure(run.state.lora, run.frozen)
    left = dense_linears(run.frozen).nbytes
    parts = {
        "base": size.quantized_bytes,
        **({"linear layers not in 4 bits": left} if left else {}),
        "embeddings, norms, head": size.dense_bytes - left,
        "adapters": size.trainable_bytes,
        "optimizer state": tree_bytes(run.state.opt_state),
        **_temporaries(config, run, remat, target),
    }
    host = {"activations": _stored(config, run, "full") if remat == "offload" else 0}
    budget, verdict = device_budget(config, target.memory_bytes - CONTEXT_BYTES), "fits"
    excess = sum(parts.values()) - budget
    if excess > 0:
        # Three pages of it come and go.
        moved = min(parts["optimizer state"], excess + 3 * PAGE_BYTES)
        parts |= {
            "optimizer state": parts["optimizer state"] - moved,
            "pages of optimizer state": min(moved, 3 * PAGE_BYTES),
        }
        host["optimizer state"] = moved
        verdict = "fits with paging" if sum(parts.values()) <= budget else "does not fit"
    peak = sum(parts.values())
    return Estimate(device, "estimate", peak, sum(host.values()), budget, verdict, parts, host)


def _remat(config: config_dict.ConfigDict, target: GpuTarget) -> str:
    remat = choose_remat(config.model.remat, target.device)
    return "full" if _in_chunks(config) and remat != "offload" else remat


def _in_chunks(config: config_dict.ConfigDict) -> bool:
    return 0 < config.model.sequence_chunk < config.train.batch_size * config.data.max_len


def _temporaries(
    config: config_dict.ConfigDict, run: AbstractRun, remat: str, target: GpuTarget
) -> dict[str, int]:
    """Bytes that live at the worst of three moments, by what they are."""
    shape, (microsteps, rows, length) = run.shape, run.batch["tokens"].shape
    tokens, lora = rows * length, run.state.lora
    float32_tree = 4 * sum(leaf.size for leaf in jax.tree.leaves(lora))
    sums = float32_tree if microsteps > 1 else 0
    stored = _stored(config, run, remat)
    layer = {
        "gradients": tree_bytes(lora) + sums,
        "stored activations": stored,
        "a decoded weight": 2 * _largest_weight(shape),
        "a layer's activations": _layer(config, shape, remat, rows, length),
    }
    if _has_flash_attention(config, shape, target, length):
        layer["attention's workspace"] = _workspace(config, shape, tokens)
    else:
        layer["attention scores"] = _scores(config, shape, rows, length)
    chunk = min(config.train.loss_chunk, tokens)
    loss = {
        "gradients": sums,
        "stored activations": stored,
        "logits": 10 * chunk * shape.vocab_size,
        "hidden states": 12 * tokens * shape.hidden_size,
    }
    # Gradients of 16 bits are divided by the number of tokens in float32.
    update = {"gradients": float32_tree + 4 * max(x.size for x in jax.tree.leaves(lora))}
    return max((layer, loss, update), key=lambda parts: sum(parts.values()))


def _stored(config: config_dict.ConfigDict, run: AbstractRun, remat: str) -> int:
    """Bytes on the device that the layers of a microbatch keep for the backward pass."""
    _, rows, length = run.batch["tokens"].shape
    per_token = _stored_per_token(config, run.shape, remat)
    stored = rows * length * run.shape.num_hidden_layers * per_token
    if remat == "none" and config.lora.dtype == "float32":
        # the adapters of each layer in the compute dtype
        stored += 2 * sum(leaf.size for leaf in jax.tree.leaves(run.state.lora))
    return stored


def _stored_per_token(config: config_dict.ConfigDict, shape: LlamaConfig, remat: str) -> int:
    """Bytes that a layer stores of a token for the backward pass."""
    hidden, inner, rank = shape.hidden_size, shape.intermediate_size, config.lora.rank
    query = shape.num_attention_heads * shape.head_dim
    key = shape.num_key_value_heads * shape.head_dim
    if remat == "offload":
        return 0
    if remat == "full":
        return 2 * hidden
    if remat in ("projections", "dots"):
        projections = 2 * (2 * hidden + query + 2 * key + (1 + shape.gated_mlp) * inner)
        return projections + (14 * rank if remat == "dots" else 0)
    # Everything: inputs of the seven linear layers in 16 bits, float32 values within two norms and
    # the activation, what attention needs, the adapters' low-rank products.
    inputs = 5 * hidden + query + inner
    per_token = 2 * inputs + 16 * hidden + 20 * inner + 4 * (query + key) + 14 * rank
    per_token += 4 * shape.num_attention_heads
    return per_token + (inputs if config.lora.dropout else 0)


def _layer(
    config: config_dict.ConfigDict, shape: LlamaConfig, remat: str, rows: int, length: int
) -> int:
    """Bytes that a layer holds while it is differentiated, but for a decoded weight."""
    of_hidden, of_inner, dropout = _PER_TOKEN[remat]
    per_token = of_hidden * shape.hidden_size + of_inner * shape.intermediate_size
    if config.lora.dropout:
        per_token += _DROPOUT * shape.hidden_size
        per_token = max(per_token, dropout * shape.hidden_size)
    # Who sees whom, as truth values and as what is added to the scores.
    mask = 3 * rows * length**2 if config.data.packing else 0
    tokens, whole = rows * length, 0
    if _in_chunks(config):  # of the rest there are six arrays like the layer's input
        tokens, whole = config.model.sequence_chunk, 12 * shape.hidden_size * tokens
    return int(per_token * tokens) + whole + mask + shape.hidden_size**2


def _workspace(config: config_dict.ConfigDict, shape: LlamaConfig, tokens: int) -> int:
    """What cuDNN needs for attention's backward pass; see `targets.attention_workspace`."""
    heads, group = shape.num_attention_heads, shape.num_attention_heads // shape.num_key_value_heads
    if _in_chunks(config):
        heads = group
    grouped = 4 * shape.head_dim if group > 1 else 0
    return tokens * heads * (4 * (shape.head_dim + 1) + grouped)


def _scores(config: config_dict.ConfigDict, shape: LlamaConfig, rows: int, length: int) -> int:
    """What attention holds of the scores of a layer, where it holds them."""
    heads, queries = shape.num_attention_heads, length
    if _in_chunks(config):
        heads //= shape.num_key_value_heads
        queries = min(length, config.model.sequence_chunk)
    return 8 * rows * heads * queries * length


def _has_flash_attention(
    config: config_dict.ConfigDict, shape: LlamaConfig, target: GpuTarget, length: int
) -> bool:
    dtype, _ = choose_compute_dtype(config.model.compute_dtype, target.device)
    with devices.tracing_for(target.device):
        softcap = shape.attn_logit_softcapping
        return implementation(dtype, shape.head_dim, length, length, softcap) == "cudnn"


def _largest_weight(shape: LlamaConfig) -> int:
    return shape.hidden_size * max(
        shape.intermediate_size, shape.num_attention_heads * shape.head_dim
    )
