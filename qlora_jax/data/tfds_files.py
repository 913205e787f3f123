"""Data of TensorFlow Datasets, without TensorFlow.

    tfds:oasst_dialogues              what was prepared in ~/tensorflow_datasets, its train split
    tfds:oasst_dialogues:1.0.0#test   another split
    tfds:/data/oasst_dialogues/1.0.0  the folder itself

TFDS writes a split as several files and describes their fields in `features.json` beside them.
Prepared with `file_format="array_record"`, they are read by the `array_record` library, and
`tensorflow_datasets` (without TensorFlow since 4.9) turns their bytes into fields. Files in
TensorFlow's own format, tfrecord, are refused: only TensorFlow reads them.

`build_oasst` writes such a data set of OASST's trees.
"""

from __future__ import annotations

import pathlib
from collections.abc import Iterator, Mapping
from types import ModuleType
from typing import Any

import grain
import numpy as np

from qlora_jax.errors import DataError

PREFIX = "tfds:"
ARRAY_RECORD = ".array_record"
_FORMAT = "array_record"


def import_tfds() -> ModuleType:
    """The library.

    Raises:
        DataError: it is not installed.
    """
    try:
        import tensorflow_datasets
    except ImportError as error:
        raise DataError(
            f"data of TFDS need tensorflow-datasets, which cannot be imported ({error}): "
            "pip install tensorflow-datasets array-record importlib_resources (or "
            '"qlora-jax[tfds]"; TensorFlow is not needed)'
        ) from None
    return tensorflow_datasets


def find_tfds_files(spec: str) -> list[pathlib.Path]:
    """Finds the files of a split.

    Args:
        spec: `tfds:<name or folder>[#split]`; without a split, train, or the only one.

    Raises:
        DataError: it is not prepared, not as array_record, or has no such split.
    """
    tfds = import_tfds()
    name, _, split = spec.removeprefix(PREFIX).partition("#")
    folder = pathlib.Path(name).expanduser()
    try:
        if (folder / "dataset_info.json").is_file():
            builder = tfds.builder_from_directory(folder)
        else:
            builder = tfds.builder(name)
    except Exception as error:  # the library raises what its parts raise
        first_line = str(error).strip().partition("\n")[0]
        raise DataError(f"{spec}: neither a prepared folder nor a name: {first_line}") from None
    if not pathlib.Path(builder.data_path).is_dir():
        raise DataError(
            f"{spec} is not prepared in {builder.data_path}; do it once with "
            f"tensorflow_datasets.builder({name!r}).download_and_prepare(file_format={_FORMAT!r})"
        )
    if builder.info.file_format.value != _FORMAT:
        raise DataError(
            f"{spec}: found files of the format {builder.info.file_format.value}, need "
            f"{_FORMAT}; prepare it with file_format={_FORMAT!r}"
        )
    splits = dict(builder.info.splits)
    split = split or ("train" if "train" in splits or len(splits) != 1 else next(iter(splits)))
    if split not in splits:
        raise DataError(f"{spec}: has no split {split!r}, but {', '.join(splits) or 'none'}")
    return [pathlib.Path(path) for path in splits[split].filepaths]


def read_tfds_file(path: pathlib.Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields the examples of one file with their places, as JSON would give them.

    Raises:
        DataError: the library is not installed, or the file is damaged.
    """
    tfds = import_tfds()
    index = 0
    try:
        features = tfds.builder_from_directory(path.parent).info.features
        for record in grain.sources.ArrayRecordDataSource(str(path)):
            value = features.deserialize_example_np(record)
            yield f"{path.name}[{index}]", _plain(tfds, features, value)
            index += 1
    except DataError:
        raise
    except Exception as error:  # the library raises what its parts raise
        raise DataError(f"{path}: cannot be read after record {index}: {error}") from None


def _plain(tfds: ModuleType, feature: Any, value: Any) -> Any:
    """Texts, numbers, lists and dicts of what NumPy holds; bad UTF-8 is refused later."""
    if isinstance(feature, tfds.features.FeaturesDict):
        return {name: _plain(tfds, inner, value[name]) for name, inner in feature.items()}
    if isinstance(feature, tfds.features.Sequence):
        inner = feature.feature
        if isinstance(value, Mapping):  # a list of objects is stored as an object of lists
            columns = [[(name, one) for one in column] for name, column in value.items()]
            value = [dict(row) for row in zip(*columns, strict=True)]
        return [_plain(tfds, inner, one) for one in value]
    if isinstance(value, bytes):
        return value.decode("utf-8", errors="surrogateescape")
    return value.tolist() if isinstance(value, np.ndarray | np.generic) else value
