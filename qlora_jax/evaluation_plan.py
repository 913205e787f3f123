"""What scoring MMLU needs, and whether a GPU has it, before there is one.

The two programs of `evaluation.scoring` are compiled on abstract arrays for the GPU in question, as
`planning` does it with the training step: reading solved questions once, and asking a batch of
questions behind them. The larger peak of the two is what the device must have. The adapter stays
unmerged, as `scripts/evaluate.py --suite=mmlu` has it.

The time is a range and an estimate: from a roofline, the least that arithmetic and memory traffic
can take together, to what it takes at a third of both, as a program does that is not tuned. Nothing
of it was measured on a GPU.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import PyTree
from ml_collections import config_dict

from qlora_jax.errors import ConfigError
from qlora_jax.evaluation.packed_prompts import ROW_WIDTH, Layout, places_of
from qlora_jax.evaluation.scoring import LONGEST, prefix_length, read_prefix, score_next
from qlora_jax.memory_limits import CONTEXT_BYTES, MemoryPlan
from qlora_jax.models.kv_cache import KVCache
from qlora_jax.models.llama import Llama
from qlora_jax.placement import tree_bytes
from qlora_jax.planning import tensor_flops
from qlora_jax.report import ModelSize, measure
from qlora_jax.targets import GpuTarget, compile_for, find_target
from qlora_jax.training.building import split_model
from qlora_jax.training.fitting import abstract_trained

# Of MMLU's test set: questions and subjects; and, counted on the validation set with SmolLM2's
# tokenizer of 49,152 tokens, on average the tokens of a question and of what is read once before.
_QUESTIONS, _SUBJECTS = 14_042, 57
_QUESTION_TOKENS, _SOLVED_TOKENS = 109, 513
# Share of the places that are no padding, counted likewise.
_NOT_PADDING = 0.88
# A program that is not tuned runs at a third of the roofline: the other end of the range.
_UNTUNED = 3.0
_BATCHES = tuple(2**power for power in range(9, 17))


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluationPlan(MemoryPlan):
    """The memory and time of MMLU on one GPU.

    Attributes, with those of `MemoryPlan`:
        batch_tokens: tokens of a batch.
        longest_prompt: tokens that solved questions and one question have together, at most.
        seconds: of all 14,042 questions behind five solved ones: the least, and at a third of it.
        most_batch_tokens: the largest batch that fits, of powers of two up to 65,536; 0: none. None
            where it was not looked for.
    """

    batch_tokens: int
    longest_prompt: int
    seconds: tuple[float, float]
    most_batch_tokens: int | None = None


def plan_evaluation(
    config: config_dict.ConfigDict,
    device: str = "h100",
    *,
    batch_tokens: int = 4096,
    longest: bool = True,
) -> EvaluationPlan:
    """Compiles the programs that score MMLU for a GPU, and says what they need.

    Args:
        config: a whole configuration; of it count `model` and `lora`.
        device: one of `targets.TARGETS`.
        batch_tokens: of a batch, as of `scripts/evaluate.py`.
        longest: look for the largest batch that fits, too; each try is compiled.

    Raises:
        ConfigError: a field or an argument cannot be used, or the model is no decoder.
        TargetError: unknown device, or JAX's CUDA plugin is not installed.

    >>> plan_evaluation(config, "rtx4090").verdict  # doctest: +SKIP
    'fits'
    """
    if batch_tokens < ROW_WIDTH:
        raise ConfigError(f"{batch_tokens=} must be at least {ROW_WIDTH}, the tokens of a row")
    scored = AbstractScorer.of(config, find_target(device))
    found = scored.plan(batch_tokens)
    if not longest:
        return found
    # Memory grows with the batch, so that half of the sizes need no look.
    low, high = 0, len(_BATCHES)
    while low < high:
        middle = (low + high) // 2
        if scored.plan(_BATCHES[middle]).fits:
            low = middle + 1
        else:
            high = middle
    return dataclasses.replace(found, most_batch_tokens=_BATCHES[low - 1] if low else 0)


@dataclasses.dataclass(frozen=True)
class AbstractScorer:
    """A model that is asked, without values, for one GPU."""

    model: Llama  # whose shapes and options count
    trainable: PyTree
    frozen: PyTree
    target: GpuTarget

    @classmethod
    def of(cls, config: config_dict.ConfigDict, target: GpuTarget) -> AbstractScorer:
        """The scorer of a configuration's model with its adapter."""
        model = abstract_trained(config, target.device)
        if not isinstance(model, Llama):
            raise ConfigError(
                f"{config.model.path} is an encoder-decoder, and MMLU is asked of decoders."
            )
        model.eval()
        _, lora, frozen = split_model(model)
        return cls(model, lora, frozen, target)

    @property
    def longest_prompt(self) -> int:
        """Tokens of the longest prompt."""
        return min(LONGEST, self.model.config.max_position_embeddings)

    def prefix(self) -> KVCache:
        """What the longest solved questions leave."""
        width = prefix_length(self.longest_prompt)
        return jax.eval_shape(functools.partial(self.model.init_cache, 1, width))

    @functools.cached_property
    def peak_of_reading(self) -> int:
        """Device memory of the program that reads solved questions."""
        tokens = _integers(1, self.prefix().keys.shape[2])
        arguments = *nnx.split(self.model), tokens, _integers()
        return compile_for(read_prefix, *arguments, target=self.target).peak_bytes

    def peak_of_asking(self, batch_tokens: int) -> int:
        """Device memory of the program that asks a batch."""
        rows = batch_tokens // ROW_WIDTH
        places = _integers(rows * places_of(ROW_WIDTH))
        layout = Layout(*(_integers(rows, ROW_WIDTH) for _ in range(3)), places)
        arguments = *nnx.split(self.model), layout, _integers(4), self.prefix()
        return compile_for(score_next, *arguments, target=self.target).peak_bytes

    def plan(self, batch_tokens: int) -> EvaluationPlan:
        """The plan of a batch."""
        peak = max(self.peak_of_reading, self.peak_of_asking(batch_tokens))
        size = measure(self.trainable, self.frozen)
        prefix = self.prefix()
        parts = {
            "base": size.quantized_bytes,
            "embeddings, norms, head": size.dense_bytes,
            "adapters": size.trainable_bytes,
            "keys and values of solved questions": tree_bytes([prefix.keys, prefix.values]),
        }
        parts["temporaries and batch"] = peak - sum(parts.values())
        seconds = self.roofline(size, batch_tokens)
        return EvaluationPlan(
            device=self.target.name,
            batch_tokens=batch_tokens,
            longest_prompt=self.longest_prompt,
            peak_bytes=peak,
            budget_bytes=self.target.memory_bytes - CONTEXT_BYTES,
            parts=parts,
            seconds=(seconds, _UNTUNED * seconds),
        )

    def roofline(self, size: ModelSize, batch_tokens: int) -> float:
        """Seconds that arithmetic and memory traffic of the whole test set take at least."""
        shape = self.model.config
        asked = _QUESTIONS * _QUESTION_TOKENS / _NOT_PADDING
        solved = _SUBJECTS * _SOLVED_TOKENS / _NOT_PADDING
        weights = size.quantized + size.trainable
        # Two products of attention, with the solved questions and half of the row.
        keys = _SOLVED_TOKENS + ROW_WIDTH / 2
        heads = shape.num_attention_heads * shape.head_dim * shape.num_hidden_layers
        flops = 2 * (asked + solved) * weights + 4 * asked * keys * heads
        batches = asked / batch_tokens + _SUBJECTS
        # A weight is read in 4 bits, written in 16 and read again.
        traffic = batches * (size.quantized_bytes + 4 * size.quantized)
        return flops / tensor_flops(self.target) + traffic / self.target.memory_bandwidth


def _integers(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.int32)
