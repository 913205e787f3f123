"""MMLU while a model is trained: the share of right answers before, within and after, as the QLoRA
authors watched it.

The questions are those of `eval.mmlu`, without solved ones or behind the first five of their
subject in `eval.mmlu_solved`. They are asked whenever the held-out loss is measured. Everything
that can be wrong with them shows before the base is loaded: files, subjects without solved
questions, prompts that are too long, a tokenizer without tokens for the letters.

A batch has as many tokens as one of the held-out loss, or one prompt of up to 2,048 tokens where
that is more. What prompts share is not read once, as `scripts/evaluate.py` does: its keys and
values would take memory that a plan of the training step does not know of.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import xxhash
from flax import nnx
from ml_collections import config_dict

from qlora_jax.errors import ConfigError
from qlora_jax.evaluation import mmlu
from qlora_jax.evaluation.mmlu import Accuracy, Prompt, Question
from qlora_jax.evaluation.scoring import LONGEST, Scorer
from qlora_jax.models.t5_config import T5Config
from qlora_jax.training.building import Base
from qlora_jax.training.interrupts import stop_requested

# In metrics.jsonl.
MMLU_ACCURACY = "mmlu_accuracy"
_SHOTS = 5


class StoppedError(Exception):
    """A signal came between two batches."""


class TrainingQuestions:
    """The questions of a run, and the accuracy of a model on them.

    Attributes:
        fingerprint: of all prompts and their answers: the same one, comparable accuracies.
    """

    def __init__(
        self, prompts: Sequence[Prompt], letters: Sequence[int], *, max_len: int, batch_tokens: int
    ):
        """Takes what is the same whenever they are asked.

        Args:
            prompts: at least one.
            letters: tokens of the four letters.
            max_len: of a prompt.
            batch_tokens: of a batch.
        """
        self._prompts, self._letters = list(prompts), letters
        self._max_len, self._batch_tokens = max_len, batch_tokens
        digest = xxhash.xxh3_128()
        for prompt in self._prompts:
            digest.update(np.array([prompt.answer, *letters, *prompt.ids], np.int64).tobytes())
        self.fingerprint = digest.hexdigest()

    def __len__(self) -> int:
        return len(self._prompts)

    def ask(self, model: nnx.Module) -> Accuracy | None:
        """The share of right answers over all questions; None when a signal came meanwhile.

        Args:
            model: with adapters; dropout is off.
        """
        scorer = Scorer(
            model,
            max_len=self._max_len,
            batch_tokens=self._batch_tokens,
            share_prefixes=False,
        )

        def go_on(questions: int) -> None:
            if stop_requested():
                raise StoppedError

        try:
            answers = mmlu.ask(scorer, self._letters, self._prompts, progress=go_on)
        except StoppedError:
            return None
        return mmlu.summarize(answers)["micro"]


def read_training_questions(config: config_dict.ConfigDict, base: Base) -> TrainingQuestions | None:
    """Reads the questions of a configuration and writes their prompts; None where it has none.

    Args:
        config: a whole configuration.
        base: its model.

    Raises:
        ConfigError: the model is an encoder-decoder.
        DataError: a file cannot be used, or see `mmlu.write_prompts` and `mmlu.letter_ids`.
    """
    if not config.eval.mmlu:
        return None
    questions = mmlu.read_questions(config.eval.mmlu)
    if config.eval.mmlu_max_questions:
        questions = list(spread(questions))[: config.eval.mmlu_max_questions]
    solved = mmlu.read_questions(config.eval.mmlu_solved) if config.eval.mmlu_solved else []
    if isinstance(base.shape, T5Config):
        raise ConfigError(
            f"--config.eval.mmlu={config.eval.mmlu}: MMLU is asked of decoders, and "
            f"{config.model.path} is an encoder-decoder; leave it out."
        )
    letters = mmlu.letter_ids(base.tokenizer)
    max_len = min(LONGEST, base.shape.max_position_embeddings)
    groups = mmlu.write_prompts(
        base.tokenizer, questions, solved, shots=_SHOTS if solved else 0, max_len=max_len
    )
    return TrainingQuestions(
        list(itertools.chain(*groups)),
        letters,
        max_len=max_len,
        batch_tokens=config.eval.batch_size * config.data.max_len,
    )


def spread(questions: Sequence[Question]) -> Iterator[Question]:
    """The first question of each subject, then the second of each, ...

    >>> a, b = (Question(name, "?", ("1", "2", "3", "4"), 0) for name in ("anatomy", "virology"))
    >>> [question.subject for question in spread([a, a, b])]
    ['anatomy', 'virology', 'anatomy']
    """
    groups = mmlu.by_subject(questions).values()
    for turn in itertools.zip_longest(*groups):
        yield from (question for question in turn if question is not None)


def compare(
    before: Mapping[str, Any] | None, after: Mapping[str, Any] | None
) -> tuple[float | None, float, float, int] | None:
    """Accuracies before and after training, as `CardFacts.mmlu` has them.

    Args:
        before: of `Heldout.accuracy`; also of an earlier start, which may have had other questions.
        after: likewise.

    >>> now = {"value": 0.5, "error": 0.1, "questions": 26, "fingerprint": "f"}
    >>> compare({**now, "value": 0.25}, now), compare({**now, "fingerprint": "e"}, now)
    ((0.25, 0.5, 0.1, 26), (None, 0.5, 0.1, 26))
    """
    if not after:
        return None
    same = before and before["fingerprint"] == after["fingerprint"]
    return before["value"] if same else None, after["value"], after["error"], after["questions"]
