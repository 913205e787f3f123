"""Says what a run needs and which GPU has it, without that GPU and without the weights.

    python scripts/plan.py --config=configs/guanaco_33b.py --device=rtx4090
    python scripts/plan.py --config=configs/guanaco_7b.py --device=all --json
    python scripts/plan.py --config=configs/guanaco_7b.py --batch_size=1,2,4 --max_len=512,2048
    python scripts/plan.py --config=configs/guanaco_7b.py --mode=generate --batch_size=8
    python scripts/plan.py --config=configs/guanaco_65b.py --mode=evaluate --device=a6000

The training step of the configuration is compiled for each device, and the compiler's own memory
plan is printed. The time is a roofline, the least that arithmetic and memory traffic take: an
estimate. It needs pip install "qlora-jax[cuda]" and about half a minute a device, no GPU.

With --mode=generate it is the memory of serving the model and an adapter with
`qlora_jax.generation.Engine`: --batch_size are its slots, --max_len the tokens of prompt and reply
together in each; and the longest context that fits is looked for.

With --mode=evaluate it is the memory of scoring MMLU behind five solved questions with
`scripts/evaluate.py --suite=mmlu`, in batches of --batch_tokens; the largest batch that fits; and
how long the 14,042 test questions take, as a range and an estimate.

Without JAX's CUDA plugin, or with --estimate, memory is added up from shapes in a second: an
estimate, and labelled as one. docs/performance.md says how far off it is.

Exit code 0: it fits on every device, in every batch size and length that was asked for. 3: in
one of them it does not.
"""

import dataclasses
import itertools
import json
import sys
from collections.abc import Iterator

import jax
from absl import flags
from ml_collections import ConfigDict
from rich import box
from rich.console import Console
from rich.table import Table

from qlora_jax import command_line, estimating, planning, targets
from qlora_jax.errors import ConfigError
from qlora_jax.estimating import Estimate
from qlora_jax.evaluation_plan import EvaluationPlan, plan_evaluation
from qlora_jax.planning import Plan
from qlora_jax.report import format_bytes
from qlora_jax.serving_plan import ServingPlan, plan_serving
from qlora_jax.targets import TARGETS
from qlora_jax.training.fitting import as_flags

_CONFIG = command_line.define_config()
_DEVICE = flags.DEFINE_list("device", ["h100"], f"all, or some of {', '.join(TARGETS)}")
_BATCH_SIZE = flags.DEFINE_list("batch_size", [], "several, instead of config.train.batch_size")
_MAX_LEN = flags.DEFINE_list("max_len", [], "several, instead of config.data.max_len")
_ESTIMATE = flags.DEFINE_bool("estimate", False, "do not compile: estimate from shapes")
_MODE = flags.DEFINE_enum("mode", "train", ["train", "generate", "evaluate"], "what is planned")
_BATCH_TOKENS = flags.DEFINE_list(
    "batch_tokens", ["4096"], "with --mode=evaluate: tokens of a batch, several"
)
_KV_DTYPE = flags.DEFINE_enum(
    "kv_dtype", "auto", ["auto", "int8"], "with --mode=generate: of keys and values"
)
_JSON = flags.DEFINE_bool("json", False, "print one JSON object a plan, and nothing else")

_DOES_NOT_FIT = 3
_ESTIMATED = "an estimate from shapes, nothing was compiled"


def main() -> None:
    """Plans for one device, batch size and length after the other."""
    names = list(TARGETS) if _DEVICE.value == ["all"] else _DEVICE.value
    if not names:
        raise ConfigError(f"--device is empty; give all, or some of {', '.join(TARGETS)}")
    config = _CONFIG.value
    batch_sizes = _numbers(_BATCH_SIZE) or [config.train.batch_size]
    lengths = _numbers(_MAX_LEN) or [config.data.max_len]
    several = len(batch_sizes) * len(lengths) > 1
    jax.config.update("jax_platforms", "cpu")  # a GPU of this machine may be at work
    console = Console(stderr=_JSON.value)
    if _MODE.value != "train":
        if _ESTIMATE.value:
            raise ConfigError("--estimate: only training is estimated; leave it out to compile")
        if _MODE.value == "generate":
            found = _plan_serving(config, names, batch_sizes, lengths, console)
            show = _print_serving
        else:
            found = _plan_evaluation(config, names, _numbers(_BATCH_TOKENS), console)
            show = _print_evaluation
        plans = []
        for plan in found:
            plans.append(plan)
            if _JSON.value:
                described = {"mode": _MODE.value, "verdict": plan.verdict}
                print(json.dumps(described | dataclasses.asdict(plan)), flush=True)
        if not _JSON.value:
            show(console, plans)
        if not all(plan.fits for plan in plans):
            sys.exit(_DOES_NOT_FIT)
        return
    estimated = _ESTIMATE.value or not targets.can_compile()
    if estimated and not _ESTIMATE.value:
        print(f"Estimates follow, no plans: {targets.NO_PLUGIN}", file=sys.stderr)
    plans = []
    for name, rows, length in itertools.product(names, batch_sizes, lengths):
        config.train.batch_size, config.data.max_len = rows, length
        if estimated:
            plan = estimating.estimate(config, name)
        else:
            with console.status(f"compiling {rows} x {length} tokens for {name} …"):
                plan = planning.plan(config, name, suggest=not several)
        plans.append((rows, length, plan))
        if _JSON.value:
            batch = {"batch_size": rows, "max_len": length, "method": "compiled"}
            print(json.dumps(batch | dataclasses.asdict(plan)), flush=True)
        elif not several:
            _print(console, plan)
    if several and not _JSON.value:
        _print_all(console, plans)
    if not all(plan.fits for _, _, plan in plans):
        sys.exit(_DOES_NOT_FIT)


def _plan_serving(
    config: ConfigDict,
    names: list[str],
    batch_sizes: list[int],
    lengths: list[int],
    console: Console,
) -> Iterator[ServingPlan]:
    kv_dtype = None if _KV_DTYPE.value == "auto" else _KV_DTYPE.value
    for name, rows, length in itertools.product(names, batch_sizes, lengths):
        with console.status(f"compiling {rows} slots of {length} tokens for {name} …"):
            plan = plan_serving(config, name, batch=rows, context=length, kv_dtype=kv_dtype)
        yield plan


def _print_serving(console: Console, plans: list[ServingPlan]) -> None:
    table = Table(box=box.SIMPLE, title="serving, compiled", title_justify="left")
    table.add_column("device")
    columns = ("slots", "context", "weights", "keys and values", "temporaries", "peak", "budget")
    for column in columns:
        table.add_column(column, justify="right")
    table.add_column("verdict")
    table.add_column("longest context", justify="right")
    for plan in plans:
        cache, temporaries = plan.parts["keys and values"], plan.parts["temporaries and state"]
        weights = sum(plan.parts.values()) - cache - temporaries
        sizes = (weights, cache, temporaries, plan.peak_bytes, plan.budget_bytes)
        table.add_row(
            plan.device,
            str(plan.batch),
            str(plan.context),
            *map(format_bytes, sizes),
            plan.verdict,
            f"{plan.longest_context:,}" if plan.longest_context else "none",
        )
    console.print(table)


def _plan_evaluation(
    config: ConfigDict, names: list[str], batches: list[int], console: Console
) -> Iterator[EvaluationPlan]:
    for name, tokens in itertools.product(names, batches):
        with console.status(f"compiling batches of {tokens} tokens for {name} …"):
            plan = plan_evaluation(config, name, batch_tokens=tokens)
        yield plan


def _print_evaluation(console: Console, plans: list[EvaluationPlan]) -> None:
    table = Table(box=box.SIMPLE, title="MMLU, five shots, compiled", title_justify="left")
    table.add_column("device")
    for column in ("batch", "peak", "budget"):
        table.add_column(column, justify="right")
    table.add_column("verdict")
    for column in ("largest batch", "minutes"):
        table.add_column(column, justify="right")
    for plan in plans:
        least, most = (seconds / 60 for seconds in plan.seconds)
        table.add_row(
            plan.device,
            f"{plan.batch_tokens:,}",
            format_bytes(plan.peak_bytes),
            format_bytes(plan.budget_bytes),
            plan.verdict,
            f"{plan.most_batch_tokens:,}" if plan.most_batch_tokens else "none",
            f"{least:.2g} to {most:.2g}",
        )
    console.print(table)
    solved = format_bytes(plans[0].parts["keys and values of solved questions"])
    lines = (
        f"of the peak, {solved} are keys and values of solved questions of "
        f"{plans[0].longest_prompt:,} tokens",
        "minutes: 14,042 questions, the roofline and three times that; an estimate, nothing timed",
    )
    for line in lines:
        console.print(f"  {line}", soft_wrap=True)


def _numbers(flag: flags.FlagHolder) -> list[int]:
    try:
        return [int(text) for text in flag.value]
    except ValueError:
        given = ",".join(flag.value)
        raise ConfigError(f"--{flag.name}={given}: whole numbers are needed, as in 1,2,4") from None


def _print_all(console: Console, plans: list[tuple[int, int, Plan | Estimate]]) -> None:
    table = Table(box=box.SIMPLE)
    if isinstance(plans[0][-1], Estimate):
        table.title, table.title_justify = _ESTIMATED, "left"
    table.add_column("device")
    for column in ("batch", "length", "peak", "pinned host", "budget"):
        table.add_column(column, justify="right")
    table.add_column("verdict")
    for rows, length, plan in plans:
        sizes = (plan.peak_bytes, plan.host_bytes, plan.budget_bytes)
        sizes = [format_bytes(size) if size else "-" for size in sizes]
        table.add_row(plan.device, str(rows), str(length), *sizes, plan.verdict)
    console.print(table)


def _print(console: Console, plan: Plan | Estimate) -> None:
    title = f"{plan.device}: {plan.verdict}"
    if isinstance(plan, Estimate):
        title += f" ({_ESTIMATED})"
    table = Table(box=box.SIMPLE, title=title, title_justify="left")
    table.add_column("on the device")
    table.add_column("bytes", justify="right")
    for part, count in plan.parts.items():
        if count >= 2**16:  # else it would read as nothing
            table.add_row(part, format_bytes(count))
    for part, count in plan.host_parts.items():
        if count >= 2**16:
            table.add_row(f"in the host's memory: {part}", format_bytes(count), style="cyan")
    table.add_section()
    table.add_row("peak on the device", format_bytes(plan.peak_bytes))
    forced = _CONFIG.value.optimizer.device_budget_gb
    less = f"memory less {format_bytes(planning.CONTEXT_BYTES)} for context and libraries"
    table.add_row(
        f"budget: {less}" + (f", at most {forced:g} GB" if forced else ""),
        format_bytes(plan.budget_bytes),
    )
    console.print(table)
    if isinstance(plan, Estimate):
        return
    console.print(
        f"  a step: {plan.flops / 1e12:,.0f} TFLOP, {plan.traffic_bytes / 1e9:,.0f} GB through "
        f"memory; not under {plan.seconds:.2f} s (an estimate)"
        + (f", {plan.paging_seconds:.2f} s of it paging" if plan.paging_seconds else "")
    )
    if plan.changes:
        console.print(f"  it would fit with {as_flags(plan.changes)}", soft_wrap=True)
    elif not plan.fits:
        console.print("  no smaller setting that was tried fits either: take a larger device")


if __name__ == "__main__":
    command_line.run(main)
