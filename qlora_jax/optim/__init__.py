"""Optimizers: the recipe with its schedules, moments in 8 bits, moments in the host's memory."""

from qlora_jax.optim.adamw8bit import adamw8bit as adamw8bit
from qlora_jax.optim.paged import paged as paged
from qlora_jax.optim.recipe import make_optimizer as make_optimizer
from qlora_jax.optim.recipe import make_schedule as make_schedule
