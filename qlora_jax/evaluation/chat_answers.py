"""A model answers a chat benchmark: Vicuna's questions, Open Assistant's, MT-bench, or others.

Answers are drawn as in the QLoRA paper, by nucleus sampling with p = 0.9 at temperature 0.7. The
second turn of a question is asked behind the model's own answer to the first. All conversations
that are open share one batch of the engine; a turn that follows goes into the slot whose cache
still holds the conversation.

The seed of an answer comes from the seed that was given, the question's id and the turn: an answer
does not depend on what else was asked, nor on where an evaluation was stopped and continued.
"""

from __future__ import annotations

import collections
import json
import os
import pathlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import xxhash

from qlora_jax.errors import EvaluationError
from qlora_jax.evaluation.journal import Journal
from qlora_jax.evaluation.questions import Question, in_turns, read_questions
from qlora_jax.evaluation.replies import Reply
from qlora_jax.evaluation.suites import Candidate, content_hash, progress_bar, write_figures
from qlora_jax.generation import Engine, Request, Sampling, encode_prompt

PAPER_SAMPLING = Sampling(temperature=0.7, top_p=0.9)


class ChatResult(NamedTuple):
    """What a benchmark's answers came to.

    Attributes:
        path: of the file of answers.
        answers: how many questions were answered.
        tokens: of all replies.
        too_long: ids of the questions that do not fit the model, in one of their turns.
        cut: ids of the questions of which an answer was ended by the limit, not by the model.
    """

    path: pathlib.Path
    answers: int
    tokens: int
    too_long: tuple[str, ...]
    cut: tuple[str, ...]


def converse(
    engine: Engine,
    questions: Iterable[Question],
    *,
    sampling: Sampling = PAPER_SAMPLING,
    max_new_tokens: int = 1024,
    seed: int = 0,
) -> Iterator[tuple[Question, list[Reply]]]:
    """Asks all turns of all questions.

    Args:
        engine: idle; its adapter, if it has one, answers.
        questions: what to ask.
        sampling: how tokens are chosen.
        max_new_tokens: of a reply, where the engine has room for so many behind the prompt.
        seed: of the random choices.

    Yields:
        A question with its replies, as soon as all are complete. Fewer than it has turns: the next
        prompt is too long for the engine.

    Raises:
        DataError: the model has no chat template, or it refuses a conversation.
        ConfigError: a setting cannot be meant.
    """
    adapter = next(iter(engine.adapters), None)
    waiting = collections.deque((question, []) for question in questions)
    open_: dict[int, tuple[Question, list[Reply]]] = {}
    texts: dict[int, list[str]] = {}
    while waiting or open_:
        # No more than there are slots: a following turn goes first, while its cache is there.
        while waiting and len(open_) < engine.slots:
            question, replies = waiting.popleft()
            ids = _prompt(engine, question, replies)
            room = engine.max_len - len(ids)
            if room < 1:
                yield question, replies
                continue
            request = Request(
                ids,
                max_new_tokens=min(max_new_tokens, room),
                sampling=sampling,
                seed=_seed(seed, question.question_id, len(replies)),
                adapter=adapter,
            )
            number = engine.submit(request)
            open_[number], texts[number] = (question, replies), []
        for delta in engine.step():
            texts[delta.request_id].append(delta.text)
            if delta.finish_reason is None:
                continue
            question, replies = open_.pop(delta.request_id)
            # Some formats have a space in front of an answer.
            text = "".join(texts.pop(delta.request_id)).strip()
            replies = [*replies, Reply(text, delta.tokens, delta.finish_reason)]
            if len(replies) == len(question.turns):
                yield question, replies
            else:
                waiting.appendleft((question, replies))


def _prompt(engine: Engine, question: Question, replies: Sequence[Reply]) -> list[int]:
    messages = question.messages([reply.text for reply in replies])
    try:
        return encode_prompt(engine.tokenizer, messages)
    except Exception as error:
        error.add_note(f"The question is {question.question_id}.")
        raise


def _seed(seed: int, question_id: str, turn: int) -> int:
    return xxhash.xxh3_64_intdigest(f"{seed}\0{question_id}\0{turn}".encode()) % 2**31


def run_chat(
    candidate: Candidate,
    data: str,
    *,
    sampling: Sampling = PAPER_SAMPLING,
    max_new_tokens: int = 1024,
    slots: int = 8,
    seed: int = 0,
) -> ChatResult:
    """Answers a chat benchmark, and goes on where it was stopped.

    The folder gets `answers.jsonl`, which judges and the game of `serve.py` read, `chat.json` with
    the settings and counts, and the journal `chat.journal`.

    Args:
        candidate: the model.
        data: file of the questions, see `read_questions`.
        sampling: how tokens are chosen.
        max_new_tokens: of a reply.
        slots: conversations at a time; it has no say in the answers, but for rounding.
        seed: of the random choices.

    Raises:
        DataError: a file cannot be understood, or the model has no chat template.
        EvaluationError: the folder holds another evaluation, or cannot be written.
        ConfigError: see `Engine`.
    """
    questions = read_questions(data)
    sampling.validate()
    engine = Engine(candidate.model, candidate.tokenizer, slots=slots, max_len=candidate.max_len)
    settings = {
        "suite": "chat",
        "model": candidate.identity(),
        "questions": content_hash(data),
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "max_new_tokens": max_new_tokens,
        "max_len": engine.max_len,
        "seed": seed,
    }
    with Journal(candidate.out / "chat.journal", settings) as journal, progress_bar() as bar:
        task = bar.add_task("answers", total=len(questions), completed=len(journal.records))
        left = [one for one in questions if one.question_id not in journal.records]
        for question, replies in converse(
            engine, left, sampling=sampling, max_new_tokens=max_new_tokens, seed=seed
        ):
            journal.write([(question.question_id, replies)])
            bar.advance(task)
        replies = {key: [Reply(*one) for one in found] for key, found in journal.records.items()}
    answered = [one for one in questions if len(replies[one.question_id]) == len(one.turns)]
    path = candidate.out / "answers.jsonl"
    write_lines(path, (_record(candidate, one, replies[one.question_id]) for one in answered))
    result = ChatResult(
        path=path,
        answers=len(answered),
        tokens=sum(reply.tokens for found in replies.values() for reply in found),
        too_long=tuple(
            one.question_id for one in questions if len(replies[one.question_id]) < len(one.turns)
        ),
        cut=tuple(
            one.question_id
            for one in answered
            if any(reply.finish_reason == "length" for reply in replies[one.question_id])
        ),
    )
    write_figures(candidate, "chat", settings, result._asdict() | {"path": path.name})
    return result


def _record(
    candidate: Candidate, question: Question, replies: Sequence[Reply]
) -> Mapping[str, Any]:
    texts = [reply.text for reply in replies]
    several = len(texts) > 1
    return {
        "question_id": question.question_id if question.written_id is None else question.written_id,
        "text": question.text,
        "category": question.category,
        **({"turns": question.turns, "generations": texts} if several else {}),
        "generation": in_turns(texts),
        "model": candidate.name,
        "tokens": [reply.tokens for reply in replies],
        "finish_reason": [reply.finish_reason for reply in replies],
    }


def write_lines(path: pathlib.Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Writes JSON Lines whole or not at all.

    Raises:
        EvaluationError: the disk is full or gone.
    """
    partial = path.with_name(f"{path.name}.partial")
    try:
        with partial.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(one) + "\n" for one in records)
        os.replace(partial, path)
    except OSError as error:
        raise EvaluationError(f"{path} cannot be written: {error.strerror}") from error
