"""The two kinds of models in a run: what a batch of each holds, and what its loss is.

    decoder           one sequence a record: prompt and answer, loss on the answer
    encoder-decoder   two: the prompt goes to the encoder, the answer to the decoder, with all loss

Everything else about a run (adapters, optimizer, steps, checkpoints, evaluation) is the same for
both and does not know which one it has.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int
from ml_collections import config_dict

from qlora_jax.data.batches import BuildBatch, make_batch
from qlora_jax.data.formats import Record
from qlora_jax.data.masking import Example, tokenize_each
from qlora_jax.data.packing import ARRAY_NAMES
from qlora_jax.data.pairs import SOURCE_NAMES, make_pair_batch, tokenize_pairs
from qlora_jax.data.token_cache import Tokenize
from qlora_jax.errors import ConfigError
from qlora_jax.models.kinds import Shape
from qlora_jax.models.t5_config import T5Config
from qlora_jax.training.step import Batch, LossFn, next_token_loss, summed_loss


@dataclasses.dataclass(frozen=True)
class Family:
    """What differs between the kinds.

    Attributes:
        loss: the loss that a run trains with and measures.
        tokenize: makes examples of records, with the options of `data.token_options`.
        build: makes a batch of examples, see `BatchIterator`.
        widths: of rows of so many tokens, the width of each array of a batch.
    """

    loss: LossFn
    tokenize: Tokenize
    build: BuildBatch
    widths: Callable[[int], dict[str, int]]


def family_of(shape: Shape, config: config_dict.ConfigDict) -> Family:
    """The family of a model, with the settings of a run.

    Args:
        shape: of the model.
        config: a whole configuration.

    Raises:
        ConfigError: a setting is not for this kind of model; all such are listed.
    """
    if isinstance(shape, T5Config):
        return _encoder_decoder(config)
    return Family(
        loss=functools.partial(
            next_token_loss, chunk_size=config.train.loss_chunk, packed=config.data.packing
        ),
        tokenize=tokenize_each,
        build=make_batch,
        widths=lambda length: dict.fromkeys(ARRAY_NAMES, length),
    )


def _encoder_decoder(config: config_dict.ConfigDict) -> Family:
    data = config.data
    problems = {
        "data.source_max_len=0: needs the width of the encoder's rows": not data.source_max_len,
        "data.target_max_len=0: needs the width of the decoder's rows": not data.target_max_len,
        "data.packing=True: needs False, one record a row": data.packing,
        "data.train_on=all: needs auto, loss is on the answer": data.train_on == "all",
        "data.paper_exact=True: needs False, it is of decoders": data.paper_exact,
        "train.neftune_alpha: needs 0, the noise is of decoders": config.train.neftune_alpha,
    }
    if found := [problem for problem, is_so in problems.items() if is_so]:
        raise ConfigError("this model is an encoder-decoder:\n  " + "\n  ".join(found))
    widths = {"source_len": data.source_max_len, "target_len": data.target_max_len}

    def widths_of(length: int) -> dict[str, int]:
        source = dict.fromkeys(SOURCE_NAMES, min(length, data.source_max_len))
        return source | dict.fromkeys(ARRAY_NAMES, min(length, data.target_max_len))

    return Family(
        loss=functools.partial(sequence_to_sequence_loss, chunk_size=config.train.loss_chunk),
        tokenize=_tokenize_pairs,
        build=functools.partial(make_pair_batch, **widths),
        widths=widths_of,
    )


def _tokenize_pairs(*args: Any, **options: Any) -> Iterator[tuple[Record, Example]]:
    """`tokenize_pairs`, without the options that are a decoder's; see `_encoder_decoder`."""
    ours = {k: v for k, v in options.items() if k not in ("max_len", "train_on", "paper_exact")}
    return tokenize_pairs(*args, **ours)


def sequence_to_sequence_loss(
    model: nnx.Module, batch: Batch, *, chunk_size: int = 256
) -> tuple[Float[Array, ""], Int[Array, ""]]:
    """Summed loss of the targets of one microbatch.

    The decoder is given a target one place to the right, behind `decoder_start_token_id`, and so
    predicts each of its tokens from the source and the tokens before it.

    Args:
        model: a `models.t5.T5`, or what has its `encode`, `decode`, `head` and `config`.
        batch: `tokens`, `loss_mask`, `segment_ids`, `positions` of the targets, int32 [B, T], and
            `source_tokens`, `source_segment_ids`, int32 [B, S].
        chunk_size: tokens whose logits exist at one time.

    Returns:
        The sum of the negative log-likelihoods in nats (float32), and how many tokens it is over.
    """
    tokens, source_segments = batch["tokens"], batch["source_segment_ids"]
    start = model.config.decoder_start_token_id
    inputs = jnp.where(batch["positions"] == 0, start, jnp.roll(tokens, 1, axis=-1))
    encoded = model.encode(batch["source_tokens"], source_segments)
    hidden = model.decode(inputs, encoded, batch["segment_ids"], source_segments)
    loss = summed_loss(model, hidden, tokens, batch["loss_mask"], chunk_size)
    return loss, jnp.sum(batch["loss_mask"])
