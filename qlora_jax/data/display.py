"""Data for the eye: records with the tokens that carry loss set off, and a histogram of lengths.

Where there is colour, loss is green; where there is none (a pipe, a log file), it stands between
«…».
"""

from collections.abc import Sequence

import numpy as np
from rich.console import Console
from rich.text import Text

from qlora_jax.data.masking import Example
from qlora_jax.data.report import DataReport
from qlora_jax.data.spans import ChatTokenizer
from qlora_jax.data.stats import summarize

LOSS_STYLE = "bold green"
CONTEXT_STYLE = "dim"
_OPEN, _CLOSE = "«", "»"
# A record must not be able to move the cursor or change colours of the terminal it is shown on.
_VISIBLE = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"} | {127: 0x2421}
_VISIBLE |= {code: 0xFFFD for code in range(128, 160)}


def token_runs(example: Example, tokenizer: ChatTokenizer) -> list[tuple[str, bool]]:
    """Decodes an example in runs of tokens that carry loss or do not.

    Args:
        example: a tokenized record.
        tokenizer: decodes it; special tokens are shown.

    Returns:
        The text in order, each part with whether its tokens carry loss. Control characters are
        replaced by visible ones.
    """
    if not len(example.tokens):
        return []
    borders = [0, *(np.flatnonzero(np.diff(example.loss_mask)) + 1), len(example.tokens)]
    runs = []
    for start, end in zip(borders, borders[1:], strict=False):
        ids = [int(token) for token in example.tokens[start:end]]
        text = tokenizer.decode(ids, skip_special_tokens=False)
        runs.append((text.translate(_VISIBLE), bool(example.loss_mask[start])))
    return runs


def colored_tokens(example: Example, tokenizer: ChatTokenizer, *, color: bool = True) -> Text:
    """One example as a `rich` text.

    Args:
        example: a tokenized record.
        tokenizer: decodes it.
        color: green for what carries loss; otherwise it is put between «…».

    Returns:
        The text, special tokens included.
    """
    text = Text()
    for part, carries_loss in token_runs(example, tokenizer):
        if color:
            text.append(part, style=LOSS_STYLE if carries_loss else CONTEXT_STYLE)
        else:
            text.append(f"{_OPEN}{part}{_CLOSE}" if carries_loss else part)
    return text


def legend(*, color: bool = True) -> Text:
    """Says how `colored_tokens` marks what carries loss.

    >>> legend(color=False).plain
    'tokens that carry loss stand between «…»'
    """
    if not color:
        return Text(f"tokens that carry loss stand between {_OPEN}…{_CLOSE}")
    return Text.assemble(
        "tokens that carry loss are ",
        ("green", LOSS_STYLE),
        ", the rest is ",
        ("dim", CONTEXT_STYLE),
    )


def length_histogram(lengths: Sequence[int], *, bins: int = 10, width: int = 40) -> list[str]:
    """A histogram as lines of text, the longest bar `width` wide.

    Args:
        lengths: tokens of each example, at least one.
        bins: most bars.
        width: characters of the longest bar.

    Returns:
        One line a bar: from, to (inclusive), bar, count.

    >>> for line in length_histogram([3, 4, 12, 14, 15, 31], bins=4, width=6):
    ...     print(line)
     3-10 | ####   2
    11-18 | ###### 3
    19-26 |        0
    27-31 | ##     1
    """
    low, high = min(lengths), max(lengths)
    step = (high - low) // bins + 1
    edges = list(range(low, high + 1, step))
    counts = np.bincount((np.asarray(lengths) - low) // step, minlength=len(edges)).tolist()
    digits = len(str(high))
    unit = max(counts) / width
    lines = []
    for edge, count in zip(edges, counts, strict=True):
        # Whatever is there is seen: a bar of a small count has at least one character.
        bar = "#" * max(round(count / unit), min(count, 1))
        span = f"{edge:>{digits}}-{min(edge + step - 1, high):<{digits}}"
        lines.append(f"{span} | {bar:<{width}} {count:,}")
    return lines


def print_data(
    examples: Sequence[Example],
    report: DataReport,
    tokenizer: ChatTokenizer,
    *,
    seq_len: int,
    count: int = 3,
    rows: int = 16,
    facts: Sequence[str] = (),
    console: Console | None = None,
) -> None:
    """Prints some examples, the histogram of lengths, and the numbers.

    Args:
        examples: tokenized records, at least one.
        report: what happened while they were read and tokenized.
        tokenizer: decodes them.
        seq_len: tokens of one row of a batch, for the share of padding.
        count: how many examples to print, spread evenly over the file.
        rows: rows of a batch, for the share of padding when grouped by length.
        facts: further lines for the numbers.
        console: where to; standard output by default.
    """
    console = console or Console(highlight=False)
    color = console.color_system is not None and not console.no_color

    def line(text: str | Text = "", style: str = "") -> None:
        console.print(text, style=style, markup=False, soft_wrap=True)

    count = min(count, len(examples))
    line(Text.assemble(f"{count} of {len(examples):,} records; ", legend(color=color)))
    for index in np.linspace(0, len(examples) - 1, count).round().astype(int):
        example = examples[index]
        facts = f"{len(example.tokens)} tokens, {int(example.loss_mask.sum())} with loss"
        cut = ", truncated" if example.truncated else ""
        line()
        line(f"{example.record_id}: {facts}{cut}", style="bold")
        line(colored_tokens(example, tokenizer, color=color))
    line()
    line("Length in tokens", style="bold")
    for row in length_histogram([len(example.tokens) for example in examples]):
        line(f"  {row}")
    line()
    line("In numbers", style="bold")
    for row in [*report.lines(), *summarize(examples, seq_len, rows).lines(), *facts]:
        line(f"  {row}")
