"""What a training run tells the person in front of it.

Every line is printed once and stays: no progress bars that redraw, so a terminal, a notebook, a log
file and `| tee` all show the same. Colour is an addition.
"""

from __future__ import annotations

import contextlib
import dataclasses
import pathlib
import re
import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import PyTree
from rich.console import Console
from rich.text import Text

from qlora_jax.data import display
from qlora_jax.data.masking import ChatTokenizer, Example
from qlora_jax.metrics import device_memory, host_memory
from qlora_jax.quantized import QuantizedTensor
from qlora_jax.tree import flatten_paths
from qlora_jax.vocabulary import Int8Rows


@dataclasses.dataclass(frozen=True)
class ModelSize:
    """Parameters and bytes of the parts of a model that is fine-tuned.

    Attributes:
        trainable: LoRA parameters.
        trainable_bytes: their bytes.
        quantized: frozen parameters in 4 bits.
        quantized_bytes: their bytes, codes and scales.
        dense: the other frozen parameters: norms, biases, embeddings and head (also in 8 bits).
        dense_bytes: their bytes.
    """

    trainable: int
    trainable_bytes: int
    quantized: int
    quantized_bytes: int
    dense: int
    dense_bytes: int

    @property
    def frozen(self) -> int:
        """All frozen parameters."""
        return self.quantized + self.dense

    @property
    def frozen_bytes(self) -> int:
        """Bytes of all frozen parameters."""
        return self.quantized_bytes + self.dense_bytes

    @property
    def bits_per_frozen(self) -> float:
        """Mean bits per frozen parameter."""
        return 8 * self.frozen_bytes / max(self.frozen, 1)


def measure(lora: PyTree, frozen: PyTree) -> ModelSize:
    """Counts parameters and bytes; arrays that are no parameters (random streams) do not count.

    The leaves may be abstract (`jax.ShapeDtypeStruct`).

    >>> size = measure({"lora_a": jnp.ones((4, 2))}, {"norm": jnp.ones(8, jnp.bfloat16)})
    >>> size.trainable, size.trainable_bytes, size.dense_bytes, size.bits_per_frozen
    (8, 32, 16, 16.0)
    """

    def is_table(leaf):
        return isinstance(leaf, QuantizedTensor | Int8Rows)

    quantized, dense = [], []
    for leaf in jax.tree.leaves(frozen, is_leaf=is_table):
        if isinstance(leaf, QuantizedTensor):
            quantized.append(leaf)
        elif isinstance(leaf, Int8Rows) or jnp.issubdtype(leaf.dtype, jnp.floating):
            dense.append(leaf)

    def total(leaves):
        arrays = jax.tree.leaves(leaves)
        return sum(x.size for x in leaves), sum(x.size * x.dtype.itemsize for x in arrays)

    return ModelSize(*total(jax.tree.leaves(lora)), *total(quantized), *total(dense))


class DenseLinears(NamedTuple):
    """Linear layers of a stack that are not in 4 bits: how many, and of what size."""

    layers: int
    parameters: int
    nbytes: int


def dense_linears(frozen: PyTree) -> DenseLinears:
    """Counts the stacked linear layers that are left in 16 or 32 bits.

    >>> kernel = jnp.zeros((2, 4, 3), jnp.bfloat16)
    >>> dense_linears({"layers": {"q_proj": {"kernel": kernel}}})
    DenseLinears(layers=2, parameters=24, nbytes=48)
    """
    leaves = flatten_paths(frozen, is_leaf=lambda leaf: isinstance(leaf, QuantizedTensor))
    name = re.compile(r"(.*/)?layers/.*/kernel(/parts/\d+)?")
    found = [
        leaf
        for path, leaf in leaves.items()
        if name.fullmatch(path) and not isinstance(leaf, QuantizedTensor) and leaf.ndim == 3
    ]
    sizes = [(leaf.shape[0], leaf.size, leaf.size * leaf.dtype.itemsize) for leaf in found]
    return DenseLinears(*map(sum, zip(*sizes, strict=True))) if sizes else DenseLinears(0, 0, 0)


def describe_frozen(size: ModelSize, frozen: PyTree, quant_type: str) -> str:
    """The frozen part of a model in a line: how much of it has how many bits.

    Args:
        size: from `measure`.
        frozen: the tree that was measured.
        quant_type: of what was quantized.
    """
    bits = 8 * size.quantized_bytes / max(size.quantized, 1)
    dense_bits = 8 * size.dense_bytes / max(size.dense, 1)
    linears = dense_linears(frozen)
    line = (
        f"{format_count(size.frozen)} parameters in {format_bytes(size.frozen_bytes)}, "
        f"{size.bits_per_frozen:.2f} bits each: {format_count(size.quantized)} in {quant_type} at "
        f"{bits:.3f} bits, "
    )
    if linears.layers:
        line += (
            f"{format_count(linears.parameters)} of {linears.layers} linear layers "
            f"({format_bytes(linears.nbytes)}) and "
        )
    rest = format_count(size.dense - linears.parameters)
    return f"{line}{rest} embeddings and norms at {dense_bits:.0f}"


def format_bytes(count: float) -> str:
    """Bytes for a reader.

    >>> format_bytes(98_362_432), format_bytes(3 * 2**30)
    ('93.8 MiB', '3.00 GiB')
    """
    if count >= 2**30:
        return f"{count / 2**30:.2f} GiB"
    return f"{count / 2**20:.1f} MiB"


def format_count(count: float) -> str:
    """Parameters for a reader.

    >>> format_count(134_515_008), format_count(1_234), format_count(7_000_000_000)
    ('134.5 M', '1,234', '7.00 B')
    """
    if count >= 1e9:
        return f"{count / 1e9:.2f} B"
    return f"{count / 1e6:.1f} M" if count >= 1e6 else f"{count:,.0f}"


def format_seconds(seconds: float) -> str:
    """A duration for a reader.

    >>> format_seconds(8.24), format_seconds(61), format_seconds(7384)
    ('8.2 s', '1 min 01 s', '2 h 03 min')
    """
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, seconds = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {seconds:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def memory_in_use() -> tuple[int, str]:
    """Peak bytes so far, and of what: the device's memory, or this process where it has none."""
    device = device_memory()
    if device and "peak" in device:
        return device["peak"], "peak on the device"
    return host_memory()[1], "peak of this process"


class Report:
    """Prints a run, part by part, in the order in which it happens."""

    def __init__(self, console: Console | None = None):
        """Prints to `console`, or to standard output as rich finds it."""
        self.console = console or Console(highlight=False)

    def line(self, text: str | Text = "", style: str | None = None, end: str = "\n") -> None:
        """One line as it is: not wrapped, `[` not read as markup."""
        self.console.print(text, style=style, markup=False, soft_wrap=True, end=end)
        self.console.file.flush()

    def facts(self, title: str, rows: Sequence[tuple[str, str]]) -> None:
        """A titled list of names and what there is to say about them."""
        self.line(title, style="bold")
        width = max(len(name) for name, _ in rows)
        for name, value in rows:
            self.line(f"  {name:<{width}}  {value}")

    @contextlib.contextmanager
    def busy(self, what: str) -> Iterator[list[str]]:
        """Says what is going on before it begins, and how long it took after.

        Yields:
            A list; strings put into it are printed behind the time.
        """
        self.line(f"{what} …", end=" ")
        notes: list[str] = []
        start = time.perf_counter()
        try:
            yield notes
        except BaseException:
            self.line()
            raise
        self.line(", ".join([format_seconds(time.perf_counter() - start), *notes]))

    @property
    def has_color(self) -> bool:
        """Whether colour reaches the reader."""
        return self.console.color_system is not None and not self.console.no_color

    def sample(self, example: Example, tokenizer: ChatTokenizer) -> None:
        """One training record, with what carries loss set off."""
        text = display.colored_tokens(example, tokenizer, color=self.has_color)
        self.line()
        self.line(f"One training record ({example.record_id})", style="bold")
        self.line(Text("  ") + display.legend(color=self.has_color))
        for row in text.split("\n", allow_blank=True):
            self.line(Text("  ") + row)
        self.line()

    def step_legend(self) -> None:
        """What the numbers of the log lines are."""
        self.line(
            "\nloss: nats per token that carries loss, mean since the line before. tokens/s: all "
            "tokens\nthat are not padding. grad norm: before clipping. Memory: "
            f"{memory_in_use()[1]}.",
            style="dim",
        )

    def step(
        self,
        *,
        step: int,
        steps: int,
        loss: float,
        learning_rate: float,
        grad_norm: float,
        tokens_per_second: float,
        memory: int,
        seconds_left: float,
        heldout: float | None = None,
        mmlu: float | None = None,
    ) -> None:
        """One log step; `heldout` loss and accuracy on `mmlu` if they were just measured."""
        measured = "" if heldout is None else f"  held-out loss {heldout:.4f}"
        measured += "" if mmlu is None else f"  MMLU {mmlu:.2%}"
        self.line(
            f"step {step:>{len(str(steps))}}/{steps}  loss {loss:.4f}  lr {learning_rate:.2e}  "
            f"grad norm {grad_norm:.3f}  {tokens_per_second:,.0f} tokens/s  "
            f"{format_bytes(memory)}  {format_seconds(seconds_left)} left{measured}"
        )

    def interrupted(self, step: int, steps: int) -> None:
        """After Ctrl-C or SIGTERM."""
        self.line(f"\nstopped after step {step} of {steps}; everything is saved.", style="bold")
        self.line("The same command continues where this stopped.")

    def stopped(self, phase: str) -> None:
        """After a signal that did not wait for a step to be saved."""
        if phase != "stopped":
            self.line(
                f"\nstopped while {phase.partition(':')[0]}; what was saved before is as it was.",
                style="bold",
            )
            self.line("The same command continues.")

    def finished(self, workdir: str, steps: int) -> None:
        """When there is nothing left to do."""
        self.line(f"{workdir} is finished: all {steps} steps are done.", style="bold")
        self.line(
            "To train longer, raise --config.train.steps or --config.train.epochs; "
            "for a new run, choose another --workdir."
        )

    def heldout(self, before: float, after: float, records: int) -> None:
        """The held-out loss before and after training."""
        verdict = "lower" if after < before else "higher" if after > before else "unchanged"
        self.line()
        self.line("Held-out loss", style="bold")
        self.line(
            f"  {before:.4f} before → {after:.4f} after: {abs(after - before):.4f} nats per token "
            f"{verdict} ({records} records that were not trained on)"
        )

    def mmlu(self, before: float | None, after: float, error: float, questions: int) -> None:
        """The accuracy on MMLU before (if it was comparable) and after training."""
        self.line()
        self.line("MMLU", style="bold")
        was = "" if before is None else f"{before:.2%} before → "
        self.line(f"  {was}{after:.2%} ± {error:.2%} after ({questions:,} questions)")

    def answers(self, question: str, before: str, after: str) -> None:
        """One held-out question with the replies of the model before and after training."""
        self.line()
        self.line("One held-out question, answered before and after", style="bold")
        for name, text, style in [
            ("question", question, "dim"),
            ("before", before, "yellow"),
            ("after", after, "green"),
        ]:
            self.line(f"  {name}:", style="bold")
            # an escape sequence that a model writes must not reach the terminal
            for row in text.strip().replace("\x1b", "␛").splitlines() or ["(nothing)"]:
                self.line(f"    {row}", style=style)

    def written(self, workdir: pathlib.Path, next_commands: Sequence[str]) -> None:
        """Where everything is, and what to do with it."""
        files = [
            ("README.md", "model card: base, data, versions, losses, how to use it"),
            ("checkpoints/", "adapter, optimizer and data position, to resume or to generate from"),
            ("metrics.jsonl", "every step; the same for TensorBoard in tensorboard/"),
            ("loss.png", "the loss curve"),
            ("config.json", "the resolved configuration; scripts take it as --config"),
        ]
        rows = [(name, what) for name, what in files if (workdir / name).exists()]
        self.line()
        self.facts(f"Written to {workdir}", rows)
        self.line("Next", style="bold")
        for command in next_commands:
            self.line(f"  {command}")
