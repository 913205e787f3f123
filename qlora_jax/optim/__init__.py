"""Optimizers: the recipe's clipped AdamW with its schedules, and AdamW with moments in 8 bits."""

from qlora_jax.optim.adamw8bit import adamw8bit as adamw8bit
from qlora_jax.optim.recipe import make_optimizer as make_optimizer
from qlora_jax.optim.recipe import make_schedule as make_schedule
