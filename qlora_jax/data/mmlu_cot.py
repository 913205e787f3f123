r"""Multiple-choice questions with worked answers: the chain-of-thought prompts of MMLU.

The package `lm-eval` carries `lm_eval/tasks/mmlu/flan_cot_fewshot/_cot_prompts.json`: an object of
57 subjects, each one text of four or five questions with rationales:

    The following are multiple choice questions (with answers) about anatomy.

    Q: Which of the following is the body cavity that contains the pituitary gland?
    (A) Abdominal (B) Cranial (C) Pleural (D) Spinal
    A: Let's think step by step. ... it is contained in the Cranial cavity. The answer is (B).

Each question becomes one conversation. What the real file holds beyond that pattern: options on one
line or on several, option texts with line breaks, one question with five options, and in a few
formulas LaTeX whose backslash escapes were swallowed before publication (`\frac` became a line
break and `rac`); those are kept as they are.
"""

import re
from collections.abc import Iterator
from typing import Any

from qlora_jax.data.formats import BadField, Record, check_text, describe

_QUESTION = re.compile(r"(?:\A|\n)[ \t]*Q:")
_ANSWER = re.compile(r"\n[ \t]*A:")
_OPTION = re.compile(r"\s*\(([A-Z])\)[ \n]")
_VERDICT = re.compile(r"The answer is \(([A-Z])\)\.\Z")
_NEED_QUESTION = "a question, options (A) to (D), and an answer that ends with 'The answer is (X).'"


def looks_like_mmlu_cot(document: Any) -> bool:
    """Whether a JSON document is an object of texts with questions and answers.

    >>> looks_like_mmlu_cot({"anatomy": "Q: Which?\\n(A) x (B) y\\nA: The answer is (A)."})
    True
    """
    return (
        isinstance(document, dict)
        and bool(document)
        and all(isinstance(text, str) and _QUESTION.search(text) for text in document.values())
    )


def parse_question(subject: str, body: str, record_id: str) -> Record:
    r"""Turns one question with its rationale into a conversation.

    >>> body = "Is 7 prime?\n(A) yes (B) no\nA: Only 1 and 7 divide 7. The answer is (A).\n\n"
    >>> record = parse_question("number_theory", body, "x.json:number_theory:1")
    >>> print(record.messages[0]["content"])
    The following is a multiple choice question about number theory.
    <BLANKLINE>
    Is 7 prime?
    (A) yes
    (B) no
    >>> record.messages[1]["content"]
    'Only 1 and 7 divide 7. The answer is (A).'

    Raises:
        BadField: if options or answer are missing, or the answer names no option.
    """
    parts = _ANSWER.split(body, maxsplit=1)
    if len(parts) != 2:
        raise BadField("A", "no line that starts with 'A:'", _NEED_QUESTION)
    question, options = _split_options(parts[0])
    answer = check_text(parts[1].strip(), "A", "the rationale")
    verdict = _VERDICT.search(answer)
    if not verdict or verdict[1] not in options:
        raise BadField(
            "A",
            f"an answer that ends with {answer[-30:]!r}",
            f"'The answer is (X).' with X in {''.join(options)}",
        )
    lines = [f"({letter}) {text}" for letter, text in options.items()]
    topic = subject.replace("_", " ")
    prompt = (
        f"The following is a multiple choice question about {topic}.\n\n{question}\n"
        + "\n".join(lines)
    )
    messages = ({"role": "user", "content": prompt}, {"role": "assistant", "content": answer})
    return Record(record_id, "mmlu_cot", messages)


def _split_options(block: str) -> tuple[str, dict[str, str]]:
    """Cuts "question (A) x (B) y" at the first (A), the next (B) and so on, as far as the letters
    go in order."""
    cuts = []
    for match in _OPTION.finditer(block):
        if match[1] == chr(ord("A") + len(cuts)):
            cuts.append(match)
    if len(cuts) < 2:
        raise BadField("Q", f"{len(cuts)} options in {describe(block.strip())}", _NEED_QUESTION)
    ends = [match.start() for match in cuts[1:]] + [len(block)]
    options = {
        match[1]: block[match.end() : end].strip() for match, end in zip(cuts, ends, strict=True)
    }
    return check_text(block[: cuts[0].start()].strip(), "Q", "the question"), options


def read_mmlu_cot(document: Any, name: str) -> Iterator[tuple[str, Record | BadField]]:
    """Yields each question's place ("file.json:subject:3") with its record, or with what is wrong
    with it."""
    if isinstance(document, BadField):
        yield name, document
        return
    if not isinstance(document, dict):
        yield name, BadField("file", describe(document), "an object of subjects (format mmlu_cot)")
        return
    for subject, text in document.items():
        if not isinstance(text, str) or not (bodies := _QUESTION.split(text)[1:]):
            yield (
                f"{name}:{subject}",
                BadField(subject, describe(text), "text with lines 'Q: ...' and 'A: ...'"),
            )
            continue
        for number, body in enumerate(bodies, start=1):
            where = f"{name}:{subject}:{number}"
            try:
                yield where, parse_question(subject, body, where)
            except BadField as problem:
                yield where, problem
