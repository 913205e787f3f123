"""The training step and the evaluation step, as pure functions over pytrees.

One call of the step is one optimizer update. Its batch has a leading axis A of microbatches, and
`jax.lax.scan` adds up over them: the gradients of the *summed* loss, the sum, and the number of
tokens that carry loss. Only then is divided, so a microbatch with many answers weighs more than one
with few, and A microbatches of B rows give the same update as one batch of A * B rows:

    gradient = sum_a d(sum_t nll[a, t]) / d lora  /  sum_a count[a]

What is differentiated is the LoRA tree alone, a nested dict of arrays. The frozen base is an
argument of the compiled step (never a constant inside it) and stays where it is; the state is
donated, so the new adapter and moments take the memory of the old.

Dropout draws from keys that are a pure function of (seed, step, microbatch). A resumed run
therefore drops what an uninterrupted one would have dropped.

A step whose loss or gradient is not a finite number is *skipped*: adapter and optimizer state come
out with the bits that went in, only the step counts (see `qlora_jax.optim.skipping`).

float16 (GPUs without bfloat16) needs no loss scaling here: the backward pass starts from the summed
loss, whose gradient per logit is of order 1, and the division comes after it, in float32.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from functools import partial

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Float, Int, PyTree

from pallas_kernels.devices import compiler_options, release_unused_memory
from qlora_jax.flax_nnx import set_dropout_keys
from qlora_jax.linear_layers import HEAD_NAMES
from qlora_jax.losses import chunked_cross_entropy, next_token_targets
from qlora_jax.optim.skipping import select, skippable

Batch = Mapping[str, Array]
LossFn = Callable[[nnx.Module, Batch], tuple[Float[Array, ""], Int[Array, ""]]]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything an optimizer step changes, and all that a checkpoint must hold of the device.

    Attributes:
        step: int32 scalar, the number of optimizer steps done, skipped ones among them.
        lora: the trainable tree (nested dicts of arrays, see `qlora_jax.lora`).
        opt_state: of the optax transformation.
        key: the run's PRNG key. It never changes; per-step keys are folded out of it.
    """

    step: Int[Array, ""]
    lora: PyTree
    opt_state: optax.OptState
    key: Array


def init_state(lora: PyTree, tx: optax.GradientTransformation, seed: int) -> TrainState:
    """The state before the first step.

    >>> state = init_state({"lora_b": jnp.zeros((2, 3))}, optax.adamw(1e-3), seed=0)
    >>> int(state.step), state.lora["lora_b"].shape
    (0, (2, 3))
    """
    return TrainState(
        step=jnp.zeros((), jnp.int32), lora=lora, opt_state=tx.init(lora), key=jax.random.key(seed)
    )


def next_token_loss(
    model: nnx.Module, batch: Batch, *, chunk_size: int = 256, packed: bool = True
) -> tuple[Float[Array, ""], Int[Array, ""]]:
    """Summed next-token loss of one microbatch.

    Args:
        model: has `hidden_states(tokens, positions=, segment_ids=)` and `head(hidden)`.
        batch: `tokens`, `loss_mask`, `segment_ids`, `positions`, all int32 [B, T].
        chunk_size: tokens whose logits exist at one time.
        packed: whether a row may hold several segments. False, one segment and then padding, spares
            attention the comparison of segments, which takes T * T places: the causal mask alone
            keeps padding from what stands before it.

    Returns:
        The sum of the negative log-likelihoods in nats (float32), and how many tokens it is over.
    """
    targets, mask = next_token_targets(batch["tokens"], batch["loss_mask"], batch["segment_ids"])
    hidden = model.hidden_states(
        batch["tokens"],
        positions=batch["positions"],
        segment_ids=batch["segment_ids"] if packed else None,
    )
    return summed_loss(model, hidden, targets, mask, chunk_size), jnp.sum(mask)


def summed_loss(
    model: nnx.Module,
    hidden: Float[Array, "B T D"],
    targets: Int[Array, "B T"],
    mask: Int[Array, "B T"],
    chunk_size: int,
) -> Float[Array, ""]:
    """Sum of the negative log-likelihoods of what each position predicts.

    Args:
        model: has `head(hidden)`.
        hidden: its final hidden states.
        targets: the token that each position predicts.
        mask: 1 where that counts.
        chunk_size: tokens whose logits exist at one time.
    """
    graphdef, state = nnx.split(model)

    def head(chunk):
        # a module made inside the scan: an adapted head may draw dropout there, and NNX lets no
        # random stream of an outer trace advance (tree.map makes new variables)
        return nnx.merge(graphdef, jax.tree.map(lambda x: x, state)).head(chunk)

    adapted = {path[0] for path, _ in nnx.to_flat_state(nnx.state(model, nnx.LoRAParam))}
    return chunked_cross_entropy(
        head,
        hidden,
        targets,
        mask,
        chunk_size=chunk_size,
        trainable_head=not adapted.isdisjoint(HEAD_NAMES),
    )


def make_train_step(
    graphdef: nnx.GraphDef,
    tx: optax.GradientTransformation,
    *,
    loss_fn: LossFn = next_token_loss,
) -> Callable[[TrainState, nnx.State, Batch], tuple[TrainState, dict[str, Array]]]:
    """One jitted optimizer step over the LoRA parameters of a model.

    Args:
        graphdef: from `graphdef, lora, frozen = nnx.split(model, nnx.LoRAParam, ...)`.
        tx: any optax transformation.
        loss_fn: `(model, microbatch) -> (summed loss, token count)`.

    Returns:
        `step(state, frozen, batch) -> (state, metrics)`. `batch` holds arrays [A, B, T]; `state` is
        donated. `metrics`: the scalars `loss` (mean nats per token that carries loss), `grad_norm`
        (global, before clipping), `loss_tokens`, `tokens` (all that are not padding), `skipped`
        (bool: loss or gradient is not finite), and `microbatch_nats` [A], the summed loss of each
        microbatch.
    """
    tx = skippable(tx)

    def micro_loss(lora: PyTree, frozen: nnx.State, key: Array, microbatch: Batch):
        model = nnx.merge(graphdef, lora, set_dropout_keys(frozen, key))
        return loss_fn(model, microbatch)

    def accumulate(state: TrainState, frozen: nnx.State, batch: Batch):
        step_key = jax.random.fold_in(state.key, state.step)

        def terms_of(index: Array, microbatch: Batch):
            key = jax.random.fold_in(step_key, index)
            return jax.value_and_grad(micro_loss, has_aux=True)(state.lora, frozen, key, microbatch)

        def body(sums, microstep):
            terms = terms_of(*microstep)
            return jax.tree.map(jnp.add, sums, terms), terms[0][0]

        microsteps = batch["tokens"].shape[0]
        if microsteps == 1:  # without a second tree of gradients, only to add zero to
            terms = terms_of(jnp.int32(0), {name: x[0] for name, x in batch.items()})
            return terms, terms[0][0][None]
        # float32 sums whatever the adapter's dtype: 16 bfloat16 additions would lose small terms
        zero_grads = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), state.lora)
        zeros = ((jnp.zeros(()), jnp.zeros((), jnp.int32)), zero_grads)
        return jax.lax.scan(body, zeros, (jnp.arange(microsteps), dict(batch)))

    @partial(jax.jit, donate_argnums=0)
    def train_step(state: TrainState, frozen: nnx.State, batch: Batch):
        sums, microbatch_nats = accumulate(state, frozen, batch)
        (loss_sum, loss_tokens), grad_sum = sums
        count = jnp.maximum(loss_tokens, 1).astype(jnp.float32)
        mean_grads = jax.tree.map(lambda g: g / count, grad_sum)
        grad_norm = optax.tree.norm(mean_grads)
        finite = jnp.isfinite(grad_norm) & jnp.all(jnp.isfinite(microbatch_nats))
        with jax.named_scope("optimizer"):
            grads = jax.tree.map(lambda g, p: g.astype(p.dtype), mean_grads, state.lora)
            updates, opt_state = tx.update(grads, state.opt_state, state.lora, apply_if=finite)
            lora = select(finite, optax.apply_updates(state.lora, updates), state.lora)
        metrics = {
            "loss": loss_sum / count,
            "grad_norm": grad_norm,
            "skipped": ~finite,
            "loss_tokens": loss_tokens,
            "tokens": sum(jnp.sum(x > 0) for name, x in batch.items() if "segment_ids" in name),
            "microbatch_nats": microbatch_nats,
        }
        return TrainState(state.step + 1, lora, opt_state, state.key), metrics

    return train_step


def compile_step(
    step: Callable, state: TrainState, frozen: nnx.State, batch: Batch
) -> jax.stages.Compiled:
    """Compiles a training step for the default device, before its first use.

    Args:
        step: from `make_train_step`.
        state: arrays, or `jax.ShapeDtypeStruct`s in their place; so for `frozen` and `batch`.
        frozen: the frozen part of the model.
        batch: one batch.

    Returns:
        The compiled step; it is called like `step`, and `memory_analysis()` says what it needs.
    """
    options = compiler_options(jax.default_backend())
    compiled = step.lower(state, frozen, batch).compile(options)
    release_unused_memory()
    return compiled


@partial(jax.jit, static_argnames=("graphdef", "loss_fn"))
def _eval_step(graphdef: nnx.GraphDef, state: nnx.State, batch: Batch, loss_fn: LossFn):
    return loss_fn(nnx.merge(graphdef, state), batch)


def evaluate_loss(
    model: nnx.Module, batches: Iterable[Batch], *, loss_fn: LossFn = next_token_loss
) -> float:
    """Mean negative log-likelihood (nats) per token that carries loss, with dropout off.

    Args:
        model: is put into evaluation mode and left there.
        batches: microbatches, arrays int32 [B, T]; of one shape, or each shape compiles anew.
        loss_fn: `(model, microbatch) -> (summed loss, token count)`. Pass the same function object
            in every call: it is part of the key under which the compiled step is kept.

    Returns:
        The mean over all tokens of all batches; nan if none carries loss.
    """
    model.eval()
    graphdef, state = nnx.split(model)
    total, count = 0.0, 0
    for batch in batches:
        loss, tokens = _eval_step(graphdef, state, dict(batch), loss_fn)
        total, count = total + float(loss), count + int(tokens)
    return total / count if count else float("nan")
