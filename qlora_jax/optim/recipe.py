"""The optimizer of the recipe: clipped AdamW with a warmed-up schedule.

QLoRA (arXiv 2305.14314, appendix B) trains with AdamW, beta2 = 0.999, a constant learning rate and
gradients clipped to a global norm of 0.3. Those are the defaults here; `linear` and `cosine` decay
to zero at the last step. The result is an ordinary `optax.GradientTransformation`, so it can be
wrapped, replaced or used in a training loop that is not ours. `adamw8bit` keeps the moments in 8
bits, and `lion` (arXiv 2302.06675) has only one.

The learning-rate schedule counts *optimizer* steps, not microbatches, and starts at step 0: with
`warmup_steps=100` step 0 runs at 1/100 of the peak (a rate of exactly zero would waste a step).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax

from qlora_jax.errors import ConfigError
from qlora_jax.optim.adamw8bit import adamw8bit
from qlora_jax.optim.paged import paged
from qlora_jax.optim.skipping import Skippable, skippable

OPTIMIZERS = ("adamw", "adamw8bit", "lion")
SCHEDULES = ("constant", "linear", "cosine")


def make_schedule(
    learning_rate: float, *, schedule: str = "constant", warmup_steps: int = 0, total_steps: int = 0
) -> optax.Schedule:
    """The learning rate as a function of the optimizer step.

    Args:
        learning_rate: the peak, reached when the warmup ends.
        schedule: `constant`, or `linear` or `cosine` decay to zero at `total_steps`.
        warmup_steps: steps of linear warmup before the peak.
        total_steps: the length of the run, warmup included; `constant` does not need it.

    Raises:
        ConfigError: for an unknown schedule, or a warmup that is not shorter than a decaying run.

    >>> rate = make_schedule(1.0, schedule="linear", warmup_steps=2, total_steps=6)
    >>> [round(float(rate(step)), 2) for step in range(7)]
    [0.5, 1.0, 1.0, 0.75, 0.5, 0.25, 0.0]
    """
    if schedule not in SCHEDULES:
        raise ConfigError(
            f"optimizer.schedule={schedule!r} is not known; choose one of {', '.join(SCHEDULES)}"
        )
    decay_steps = total_steps - warmup_steps
    if schedule == "constant":
        after = optax.constant_schedule(learning_rate)
    elif decay_steps < 1:
        raise ConfigError(
            f"optimizer.warmup_steps={warmup_steps} leaves nothing of a run of {total_steps} steps "
            f"to decay over; choose fewer warmup steps or schedule='constant'"
        )
    elif schedule == "linear":
        after = optax.linear_schedule(learning_rate, 0.0, decay_steps)
    else:
        after = optax.cosine_decay_schedule(learning_rate, decay_steps)
    if warmup_steps == 0:
        return after
    first = learning_rate / warmup_steps
    warmup = optax.linear_schedule(first, learning_rate + first, warmup_steps)
    return optax.join_schedules([warmup, after], [warmup_steps])


def make_optimizer(
    learning_rate: float | optax.Schedule = 2e-4,
    *,
    name: str = "adamw",
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    max_grad_norm: float = 0.3,
    state_budget: int | None = None,
) -> Skippable:
    """Clip by the global norm, then AdamW or another.

    The moments of AdamW and Lion are in float32 also for adapters in 16 bits: with `b2 = 0.999` the
    second moment moves by a thousandth a step, which bfloat16 would round away.

    Args:
        learning_rate: a number, or a schedule from `make_schedule`.
        name: `adamw`; `adamw8bit`, see there; or `lion`.
        b1: decay of the first moment (Lion: its weight in the update).
        b2: decay of the second moment (Lion: decay of its only one).
        eps: added to the root of the second moment; Lion has none.
        weight_decay: decoupled, times the learning rate, on every trainable leaf.
        max_grad_norm: gradients with a larger global norm are scaled down to it; 0 turns it off.
        state_budget: bytes of moments on the device; the others are in the host's memory (see
            `paged`). None: all are on the device.

    Raises:
        ConfigError: for an unknown name.

    >>> import jax.numpy as jnp
    >>> tx = make_optimizer(0.1, eps=0.0)
    >>> params = {"lora_b": jnp.zeros(2)}
    >>> updates, _ = tx.update({"lora_b": jnp.array([3.0, -4.0])}, tx.init(params), params)
    >>> [round(float(u), 4) for u in updates["lora_b"]]
    [-0.1, 0.1]
    """
    if name == "adamw":
        tx = _in_float32(optax.adamw(learning_rate, b1, b2, eps, weight_decay=weight_decay))
    elif name == "adamw8bit":
        tx = adamw8bit(learning_rate, b1, b2, eps, weight_decay)
    elif name == "lion":
        tx = _in_float32(optax.lion(learning_rate, b1, b2, weight_decay=weight_decay))
    else:
        raise ConfigError(
            f"optimizer.name={name!r} is not known; choose one of {', '.join(OPTIMIZERS)}"
        )
    tx = paged(tx, state_budget)
    if max_grad_norm == 0:
        return tx
    return Skippable(*optax.chain(optax.clip_by_global_norm(max_grad_norm), tx))


def _in_float32(inner: optax.GradientTransformation) -> Skippable:
    """The same transformation computing in float32; updates come in the gradients' dtype."""
    inner = skippable(inner)

    def wide(tree):
        return jax.tree.map(lambda x: x.astype(jnp.float32), tree)

    def update(updates, state, params=None, *, apply_if=True):
        found, state = inner.update(wide(updates), state, wide(params), apply_if=apply_if)
        return jax.tree.map(lambda u, g: u.astype(g.dtype), found, updates), state

    return Skippable(lambda params: inner.init(wide(params)), update)
