"""OASST's dialogues as a data set of TFDS: a builder for JSON Lines.

    from qlora_jax.data.tfds_oasst import build_oasst

    folder = build_oasst("2023-04-12_oasst_ready.trees.jsonl.gz", "~/tensorflow_datasets")

and then `--config.data.name=oasst1 --config.data.path=tfds:oasst_dialogues`. TensorFlow is not
needed. An example has one field, `text`: the dialogue of the best-ranked replies, as in the set of
QLoRA's authors (`timdettmers/openassistant-guanaco`).
"""

from __future__ import annotations

import pathlib
from collections.abc import Iterator
from typing import Any, Literal

from qlora_jax.data.records import read_records
from qlora_jax.data.report import DataReport
from qlora_jax.data.tfds_files import import_tfds
from qlora_jax.errors import DataError

NAME = "oasst_dialogues"


def build_oasst(
    path: str | pathlib.Path,
    data_dir: str | pathlib.Path = "~/tensorflow_datasets",
    *,
    heldout: str | pathlib.Path | None = None,
    on_bad_record: Literal["error", "skip"] = "error",
) -> pathlib.Path:
    """Prepares the data set.

    Args:
        path: JSON Lines, gzipped or not, of trees as OASST publishes them (`prompt` with
            `replies`), or of dialogues (`text`); or whatever else `read_records` reads as oasst1.
        data_dir: where TFDS keeps its data.
        heldout: the same for the split `test`; None: there is no such split.
        on_bad_record: see `read_records`.

    Returns:
        The folder of the data set, in the order of the file.

    Raises:
        DataError: TFDS is not installed, a record is bad, or the data set is there already.
    """
    tfds = import_tfds()
    splits = {"train": path} | ({} if heldout is None else {"test": heldout})

    # The class says what TFDS writes; it needs no registration, because it is read by its files.
    with tfds.core.registered.skip_registration():

        class OasstDialogues(tfds.core.GeneratorBasedBuilder):
            """Dialogues of the best-ranked replies of OASST."""

            name = NAME
            VERSION = tfds.core.Version("1.0.0")

            def _info(self) -> Any:
                features = tfds.features.FeaturesDict({"text": tfds.features.Text()})
                return tfds.core.DatasetInfo(
                    builder=self, features=features, disable_shuffling=True
                )

            def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
                del dl_manager  # nothing is downloaded
                return {split: self._generate_examples(file) for split, file in splits.items()}

            def _generate_examples(self, file: Any) -> Iterator[tuple[int, dict[str, str]]]:
                records = read_records(file, "oasst1", on_bad_record, 0, DataReport())
                yield from ((i, {"text": record.text}) for i, record in enumerate(records))

        builder = OasstDialogues(
            data_dir=pathlib.Path(data_dir).expanduser(), file_format="array_record"
        )
    folder = pathlib.Path(builder.data_path)
    if folder.exists():
        raise DataError(f"{folder} is there already; remove it, or choose another data_dir")
    builder.download_and_prepare()
    return folder
