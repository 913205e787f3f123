"""What serving a model needs, and whether a GPU has it, before there is one.

The engine's two programs (`generation.slots`) are compiled on abstract arrays for the GPU in
question, as `planning` does it with the training step: decoding all slots, and reading a piece of a
prompt while the cache of all slots is there. The larger peak of the two is what the device must
have. Adapters are served as the engine does it: unmerged, beside the packed base.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import PyTree
from ml_collections import config_dict

from qlora_jax.errors import ConfigError
from qlora_jax.generation import slots as programs
from qlora_jax.generation.adapters import serve_adapters
from qlora_jax.generation.engine import LONGEST_PIECE
from qlora_jax.memory_limits import CONTEXT_BYTES, MemoryPlan
from qlora_jax.models.kv_cache import read_kv_dtype
from qlora_jax.models.llama import Llama
from qlora_jax.placement import tree_bytes
from qlora_jax.report import measure
from qlora_jax.sampling import Sampling
from qlora_jax.targets import CompiledFor, GpuTarget, compile_for, find_target
from qlora_jax.training.building import split_model
from qlora_jax.training.fitting import abstract_trained

_CHUNK = 8
# The longest context is looked for in steps of so many tokens.
_STEP = 256


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServingPlan(MemoryPlan):
    """The memory of an engine on one GPU.

    Attributes, with those of `MemoryPlan`:
        batch: slots.
        context: tokens of prompt and reply together, in each slot.
        kv_dtype: of keys and values.
        longest_context: the longest that fits in so many slots, up to what the model can see; 0:
            none. None where it was not looked for.
    """

    batch: int
    context: int
    kv_dtype: str
    longest_context: int | None = None


def plan_serving(
    config: config_dict.ConfigDict,
    device: str = "h100",
    *,
    batch: int = 1,
    context: int = 4096,
    kv_dtype: str | None = None,
    longest: bool = True,
) -> ServingPlan:
    """Compiles the engine's programs for a GPU, and says what they need.

    Args:
        config: a whole configuration; of it count `model`, `quant` and `lora`.
        device: one of `targets.TARGETS`.
        batch: slots.
        context: tokens of prompt and reply together.
        kv_dtype: None: the dtype of the computation; or "int8".
        longest: look for the longest context that fits, too; each try is compiled.

    Raises:
        ConfigError: a field or an argument cannot be used, or the model is no decoder.
        TargetError: unknown device, or JAX's CUDA plugin is not installed.

    >>> plan_serving(config, "rtx4090", batch=8).verdict  # doctest: +SKIP
    'fits'
    """
    target = find_target(device)
    served = AbstractEngine.of(config, target, kv_dtype)
    if batch < 1 or not 2 <= context <= served.limit:
        raise ConfigError(
            f"{batch=} must be at least 1, and {context=} 2 to {served.limit}, the tokens that "
            "the model can see."
        )
    found = served.plan(batch, context)
    if not longest:
        return found
    context = find_longest(lambda context: served.plan(batch, context), found, served.limit)
    return dataclasses.replace(found, longest_context=context)


def find_longest(plan: Callable[[int], ServingPlan], known: ServingPlan, limit: int) -> int:
    """The longest context that fits, in steps of 256 tokens, each confirmed by its own plan.

    What grows with the context is nearly proportional to it, so the budget is divided by that, and
    what is over after a look is taken off again.

    Args:
        plan: of a context.
        known: one of its plans.
        limit: tokens that the model can see.

    Returns:
        Tokens; 0 where not even one step fits.
    """
    context, found = known.context, known
    for _ in range(4):
        a_token = max(found.parts["keys and values"] // found.context, 1)
        spare = (found.budget_bytes - found.peak_bytes) // a_token
        reached = min(limit, (context + spare) // _STEP * _STEP)
        if found.fits and reached <= context:
            return context
        if reached < _STEP:
            return 0
        context, found = reached, plan(reached)
    return context if found.fits else 0


@dataclasses.dataclass(frozen=True)
class AbstractEngine:
    """An engine without values, for one GPU."""

    model: Llama  # whose shapes and options count
    graphdef: nnx.GraphDef
    state: nnx.State
    trainable: PyTree
    frozen: PyTree
    target: GpuTarget
    kv_dtype: str | None

    @classmethod
    def of(
        cls, config: config_dict.ConfigDict, target: GpuTarget, kv_dtype: str | None = None
    ) -> AbstractEngine:
        """The engine of a configuration's model with one adapter."""
        read_kv_dtype(kv_dtype)
        model = abstract_trained(config, target.device)
        if not isinstance(model, Llama):
            raise ConfigError(
                f"{config.model.path} is an encoder-decoder, which the engine does not serve."
            )
        _, lora, frozen = split_model(model)
        graphdef, state = abstract_serving(model)
        return cls(model, graphdef, state, lora, frozen, target, kv_dtype)

    @property
    def limit(self) -> int:
        """Tokens that the model can see."""
        return self.model.config.max_position_embeddings

    def slots(self, batch: int, context: int) -> programs.Slots:
        """The state of the replies."""

        def make() -> programs.Slots:
            dtype = read_kv_dtype(self.kv_dtype)
            cache = self.model.init_cache(batch, context, ragged=True, dtype=dtype)
            return programs.Slots.empty(cache, self.model.config.vocab_size)

        return jax.eval_shape(make)

    def compile_decode(self, batch: int, context: int, **settings: Any) -> CompiledFor:
        """The program that decodes a chunk."""
        alive = jax.ShapeDtypeStruct((batch,), bool)
        least, end_ids = (jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((), (2,)))
        options = dict(span=context, chunk=_CHUNK, greedy=False) | settings
        arrays = self.state, self.slots(batch, context), alive, end_ids, least
        return compile_for(programs.decode, self.graphdef, *arrays, target=self.target, **options)

    def compile_read(self, batch: int, context: int) -> CompiledFor:
        """The program that reads a piece of a prompt."""
        number = jax.ShapeDtypeStruct((), jnp.int32)
        new = programs.Admission(
            row=number,
            tokens=jax.ShapeDtypeStruct((min(LONGEST_PIECE, context),), jnp.int32),
            start=number,
            count=number,
            seen=jax.ShapeDtypeStruct((self.model.config.vocab_size,), bool),
            left=number,
            seed=jax.ShapeDtypeStruct((), np.uint32),
            sampling=jax.eval_shape(Sampling().as_arrays),
            adapter=number,
        )
        end_ids = jax.ShapeDtypeStruct((2,), jnp.int32)
        arrays = self.state, self.slots(batch, context), new, end_ids
        return compile_for(programs.admit, self.graphdef, *arrays, target=self.target, span=context)

    def plan(self, batch: int, context: int) -> ServingPlan:
        """The plan of so many slots and tokens."""
        compiled = [self.compile_decode(batch, context), self.compile_read(batch, context)]
        peak = max(one.peak_bytes for one in compiled)
        size, slots = measure(self.trainable, self.frozen), self.slots(batch, context)
        cache = tree_bytes([slots.cache.keys, slots.cache.values])
        scales = tree_bytes([slots.cache.key_scales, slots.cache.value_scales])
        parts = {
            "base": size.quantized_bytes,
            "embeddings, norms, head": size.dense_bytes,
            "adapters": size.trainable_bytes,
            "keys and values": cache + scales,
        }
        parts["temporaries and state"] = peak - sum(parts.values())
        return ServingPlan(
            device=self.target.name,
            batch=batch,
            context=context,
            kv_dtype=str(slots.cache.keys.dtype),
            peak_bytes=peak,
            budget_bytes=self.target.memory_bytes - CONTEXT_BYTES,
            parts=parts,
        )


def abstract_serving(model: nnx.Module) -> tuple[nnx.GraphDef, nnx.State]:
    """A model without values as the engine holds it."""
    graphdef, state = nnx.split(model)
    found = []

    def serve(state: nnx.State) -> nnx.State:
        served, _ = serve_adapters(nnx.merge(graphdef, state), None)
        served.eval()
        definition, state = nnx.split(served)
        found.append(definition)
        return state

    state = jax.eval_shape(serve, state)
    return found[-1], state
