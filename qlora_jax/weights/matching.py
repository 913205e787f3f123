"""Does a checkpoint fit a model? Answered for all tensors at once, before any is read.

And the way back: the tensor of a checkpoint for a place in the model.
"""

import collections
from collections.abc import Iterable, Mapping

import numpy as np

from qlora_jax.errors import WeightsError
from qlora_jax.mixed import take_layer
from qlora_jax.quantized import QuantizedTensor
from qlora_jax.weights.checkpoint import Checkpoint
from qlora_jax.weights.names import Slot, find_slot, is_ignored, tensor_name
from qlora_jax.weights.stacked import StackedCheckpoint

_READABLE_DTYPES = ("bfloat16", "float16", "float32", "float64")
_HEAD = Slot("lm_head/kernel", None)


def match_tensors(
    wanted: Mapping[Slot, tuple[int, ...]], checkpoint: Checkpoint
) -> dict[str, Slot]:
    """Pairs every tensor of a checkpoint with a slot of the model.

    Rotary frequencies are left out, and so is an output head where the model's is its embedding.

    Args:
      wanted: the model's slots with the shapes that their tensors have in a file.
      checkpoint: an open model.

    Returns:
      The slot for each tensor's name, in the order of the file.

    Raises:
      WeightsError: lists all tensors that are missing, not expected, or of another shape or dtype.
    """
    naming = checkpoint.naming
    plan: dict[str, Slot] = {}
    extra, wrong = [], []
    for name in checkpoint.names():
        slot = find_slot(name, naming)
        if slot in wanted:
            plan[name] = slot
            shape, dtype = checkpoint.shape(name), str(checkpoint.dtype(name))
            if shape != wanted[slot]:
                wrong.append((slot, f"is {list(shape)}, must be {list(wanted[slot])}"))
            elif dtype not in _READABLE_DTYPES:
                wrong.append((slot, f"is {dtype}, must be one of {', '.join(_READABLE_DTYPES)}"))
        elif not is_ignored(name, naming) and slot != _HEAD:
            extra.append((slot, "" if slot else name))
    missing = [(slot, "") for slot in wanted.keys() - set(plan.values())]
    if missing or extra or wrong:
        lines = [
            *(f"missing: {line}" for line in _by_layer(missing, naming)),
            *(f"not expected: {line}" for line in _by_layer(extra, naming)),
            *(f"does not fit: {line}" for line in _by_layer(wrong, naming)),
        ]
        raise WeightsError(
            f"{checkpoint.path}: {len(missing)} tensors are missing, {len(extra)} are not expected "
            f"and {len(wrong)} do not fit the model that the configuration describes:\n  "
            + "\n  ".join(lines)
            + "\nGive the configuration and the weights of the same model."
        )
    return plan


def slot_names(checkpoint: Checkpoint) -> dict[Slot, str]:
    """What a checkpoint calls the places in the model; empty where it has stacks of layers."""
    if isinstance(checkpoint, StackedCheckpoint):
        return {}
    slots = {name: find_slot(name, checkpoint.naming) for name in checkpoint.names()}
    return {slot: name for name, slot in slots.items() if slot is not None}


def read_slot(checkpoint: Checkpoint, name: str | None, slot: Slot) -> np.ndarray | QuantizedTensor:
    """Reads the tensor of a place in the model, in the orientation of files.

    Args:
      checkpoint: an open model of any kind.
      name: what it calls the tensor; not looked at where it has stacks of layers.
      slot: the place.

    Returns:
      The tensor of one layer; of a stacked checkpoint that is a part of an array.
    """
    if not isinstance(checkpoint, StackedCheckpoint):
        return checkpoint.read(name)
    value = checkpoint.read(slot.path)
    if slot.layer is not None:
        value = take_layer(value, slot.layer)
    if slot.path.endswith("/kernel") and not isinstance(value, QuantizedTensor):
        return np.ascontiguousarray(value.T)
    return value


def _by_layer(found: Iterable[tuple[Slot | None, str]], naming: str) -> list[str]:
    """Writes one line for the same finding in many layers: "blk.{0-29}.attn_q.weight"."""
    layers: dict[tuple[str, str], list[int]] = collections.defaultdict(list)
    for slot, detail in found:
        if slot is None:
            layers[detail, ""] += []
        elif slot.layer is None:
            layers[tensor_name(slot, naming), detail] += []
        else:
            pattern = tensor_name(slot._replace(layer=0), naming).replace(".0.", ".{}.", 1)
            layers[pattern, detail].append(slot.layer)
    lines = []
    for (pattern, detail), indices in sorted(layers.items()):
        name = pattern.replace("{}", _ranges(sorted(indices))) if indices else pattern
        lines.append(f"{name} {detail}".rstrip())
    return lines


def _ranges(indices: list[int]) -> str:
    """Writes sorted numbers shortly.

    >>> _ranges([3]), _ranges([0, 1, 2, 5])
    ('3', '{0-2,5}')
    """
    runs: list[list[int]] = []
    for index in indices:
        if runs and index == runs[-1][1] + 1:
            runs[-1][1] = index
        else:
            runs.append([index, index])
    text = ",".join(f"{first}-{last}" if last > first else f"{first}" for first, last in runs)
    return text if len(indices) == 1 else f"{{{text}}}"
