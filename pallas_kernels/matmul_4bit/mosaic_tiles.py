"""How the fused products in Mosaic GPU cut up their work, and what they do not serve."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Float32

from pallas_kernels.devices import current_target

TILE = 64
MAX_ROWS = 64
_SMS = 132  # of an H100


@dataclasses.dataclass(frozen=True)
class Tiles:
    """How a product is cut up along its sum.

    Attributes:
        warpgroups: of a block of threads; each has its own part of the sum, and buffers for it.
        splits: parts of the sum in different blocks of threads.
        blocks: tiles of 64 elements of the sum that a buffer holds.
        stages: buffers of a warpgroup.
    """

    warpgroups: int = 4
    splits: int = 1
    blocks: int = 2
    stages: int = 2

    def __post_init__(self) -> None:
        if self.warpgroups not in (2, 4) or self.blocks not in (1, 2):
            raise ValueError(f"{self} needs 2 or 4 warpgroups, and 1 or 2 blocks a buffer")
        if min(self.splits, self.stages) < 1:
            raise ValueError(f"{self} needs at least 1 of everything")

    def steps(self, length: int) -> int:
        """Buffers that each warpgroup consumes for a sum of so many elements."""
        return -(-length // (TILE * self.splits * self.warpgroups * self.blocks))

    def with_splits(self, tiles: int, length: int, cores: int | None = None) -> Tiles:
        """The split of the sum that gives every core about the same to do.

        Args:
            tiles: of the result, a block of threads each.
            length: of the sum.
            cores: streaming multiprocessors; by default of the device that is traced for.

        >>> Tiles().with_splits(32, 4096, cores=132).splits
        4
        """
        cores = cores or current_target().num_cores or _SMS

        def cost(splits: int) -> int:
            waves = -(-tiles * splits // cores)
            # What a block of threads does before its first and after its last step is about four.
            return waves * (dataclasses.replace(self, splits=splits).steps(length) + 4)

        return dataclasses.replace(self, splits=min(range(1, 17), key=cost))


def check_served(
    x: Float[Array, "m k"], shape: tuple[int, int], block_size: int, interpret: object
) -> None:
    """Raises NotImplementedError for input that the kernels of this folder do not serve."""
    n, k = shape
    if x.dtype not in (jnp.bfloat16, jnp.float16):
        raise NotImplementedError(f"{x.dtype=}: tensor cores take bfloat16 and float16")
    if not 1 <= x.shape[0] <= MAX_ROWS:
        raise NotImplementedError(f"{x.shape[0]=} rows: 1 to {MAX_ROWS} are served")
    if block_size % TILE or k % block_size:
        raise NotImplementedError(f"{block_size=} and {k=}: 64 columns must be of one block")
    if n % 2 or n < 2 * TILE:
        raise NotImplementedError(f"{n=} rows: an even number from {2 * TILE} on is served")
    if not interpret and current_target().architecture[0] != 9:
        raise NotImplementedError(
            f"compute capability {current_target().compute_capability}: wgmma is sm_90's alone"
        )


def interpret_params(interpret: bool | plgpu.InterpretGPUParams):
    """What `plgpu.kernel` takes."""
    return plgpu.InterpretGPUParams() if interpret is True else interpret or None


def multiply_transposed(a: Float[Array, "m k"], b: Float[Array, "n k"]) -> Float32[Array, "m n"]:
    """`a @ b.T`, which the interpreter has no `wgmma` with an operand in registers for."""
    return lax.dot_general(a, b, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
