"""Optimizers: the recipe's clipped AdamW and its learning-rate schedules."""

from qlora_jax.optim.recipe import make_optimizer as make_optimizer
from qlora_jax.optim.recipe import make_schedule as make_schedule
