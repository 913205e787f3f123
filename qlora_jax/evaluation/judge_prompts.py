"""What a judge is asked: which of two answers is better, in one of two forms.

- `threeclass`: reasons, then a last line with 1, 2 or 3 (equally good);
- `relative`: points from 1 to 10 for each, on the first line (for mathematics, where thinking comes
  first, on the last).

As the QLoRA authors did, questions on programming and on mathematics have prompts of their own; the
wording here is this project's. Verdicts are comparable only under the same prompts: to repeat the
paper's, give the authors' file (`read_prompts`).

A question of several turns is judged after each of them, with all turns so far in sight.
"""

from __future__ import annotations

import dataclasses
import pathlib
import re
from collections.abc import Mapping
from typing import Any, Literal

from qlora_jax.data.data_files import read_objects
from qlora_jax.errors import DataError
from qlora_jax.evaluation.questions import Answer, in_turns
from qlora_jax.files import resolve_path

Form = Literal["threeclass", "relative"]
FORMS: tuple[Form, ...] = ("threeclass", "relative")
GENERAL = "general"
_PLACEHOLDER = re.compile(r"\{(\w+)\}")
_ANSWERS = {"question", "answer_1", "answer_2"}
_NEED = (
    'need the authors\' prompts: JSON Lines with "system_prompt", "prompt_template" (with '
    '{question}, {answer_1} and {answer_2}), "defaults" and "category", one of which is "general"'
)
_SYSTEM = "You compare the answers of two assistants to the same user, and you are fair to both."
_TEMPLATE = """\
A user asked:

<question>
{question}
</question>

The first assistant answered:

<answer_1>
{answer_1}
</answer_1>

The second assistant answered:

<answer_2>
{answer_2}
</answer_2>

{criteria}{last_turn} Neither the place of an answer nor its length may count.

{form}
"""
_LAST_TURN = " Judge the answers to the last turn; the earlier turns are there to understand it."
_CRITERIA = {
    GENERAL: (
        "Find out which answer serves the user better: does it help, does it stay with the "
        "question, is what it says true, does it go into enough detail?"
    ),
    "coding": (
        "Find out which program serves the user better: does it do what was asked, would it run, "
        "is it efficient, can it be read, and do its comments explain what needs explaining?"
    ),
    "math": (
        "Work the problem out by yourself first. Then go through both answers step by step and "
        "look for mistakes: a right result that follows from wrong steps is not right."
    ),
}
_PAIR_FIRST = (
    "Give each answer points from 1 (useless) to 10 (nothing to improve). Your first line holds "
    "the points of the first answer, a space, the points of the second, and nothing else. Give "
    "your reasons from the second line on."
)
_PAIR_LAST = (
    "Give each answer points from 1 (useless) to 10 (nothing to improve). Write your reasons "
    "first. Your last line holds both numbers as a tuple, (first, second), and nothing else."
)
_CLASS = (
    "Write your reasons first. Your last line holds one digit and nothing else: 1 if the first "
    "answer is better, 2 if the second is, 3 if they are equally good."
)


@dataclasses.dataclass(frozen=True)
class JudgePrompt:
    """A prompt for the questions of one category.

    Attributes:
        system: the system message; empty: none.
        template: with `{question}`, `{answer_1}`, `{answer_2}` and names from `defaults`.
        defaults: by name; `last_turn` is kept only where there are several turns.
    """

    system: str
    template: str
    defaults: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def fill(self, first: Answer, second: Answer, turn: int = 0) -> list[dict[str, str]]:
        """The messages that ask a judge to compare two answers to one question.

        Args:
            first: the answer that is shown first.
            second: the other one.
            turn: the turn that is judged, from 0.
        """
        values = {
            **self.defaults,
            "question": first.question.shown(turn),
            "answer_1": in_turns(first.replies[: turn + 1]),
            "answer_2": in_turns(second.replies[: turn + 1]),
        }
        if turn == 0:
            values["last_turn"] = ""
        # At once, so that braces in an answer stay what they are.
        text = _PLACEHOLDER.sub(lambda match: values.get(match[1], match[0]), self.template)
        messages = [{"role": "user", "content": text}]
        return [{"role": "system", "content": self.system}, *messages] if self.system else messages


def own_prompts(form: Form) -> dict[str, JudgePrompt]:
    """This project's prompts, by category.

    >>> sorted(own_prompts("relative"))
    ['coding', 'general', 'math']
    """
    prompts = {}
    for category, criteria in _CRITERIA.items():
        ending = _CLASS
        if form == "relative":
            ending = _PAIR_LAST if category == "math" else _PAIR_FIRST
        values = {"criteria": criteria, "last_turn": _LAST_TURN, "form": ending}
        prompts[category] = JudgePrompt(_SYSTEM, _TEMPLATE, values)
    return prompts


def read_prompts(path: str | pathlib.Path) -> dict[str, JudgePrompt]:
    """Reads the prompts of the QLoRA authors, or others in their form.

    Args:
        path: the file.

    Returns:
        The prompts by category; "general" is for all questions that have no other.

    Raises:
        DataError: a record is not a prompt, or there is none for general questions.
    """
    file = resolve_path(str(path))
    if not file.is_file():
        raise DataError(f"{file} is a folder; {_NEED}")
    prompts: dict[str, JudgePrompt] = {}
    for where, record in read_objects(file):
        category, prompt = _read_prompt(record, where)
        if category in prompts:
            raise DataError(f"{where}: there is another prompt for {category!r} before; {_NEED}")
        prompts[category] = prompt
    if GENERAL not in prompts:
        raise DataError(f"{file}: no prompt for general questions; {_NEED}")
    return prompts


def _read_prompt(record: Any, where: str) -> tuple[str, JudgePrompt]:
    record = record if isinstance(record, dict) else {}
    system, template = record.get("system_prompt", ""), record.get("prompt_template")
    category, defaults = record.get("category"), record.get("defaults", {})
    texts = (system, template, category)
    if not isinstance(defaults, dict) or not all(
        isinstance(text, str) for text in (*texts, *defaults.values())
    ):
        raise DataError(f"{where}: not a prompt; {_NEED}")
    names = set(_PLACEHOLDER.findall(template))
    if missing := sorted(_ANSWERS - names):
        raise DataError(f"{where}: the template has no {{{missing[0]}}}; {_NEED}")
    if unknown := sorted(names - _ANSWERS - set(defaults)):
        raise DataError(f"{where}: nothing is known to put in for {{{unknown[0]}}}; {_NEED}")
    return category, JudgePrompt(system, template, defaults)
