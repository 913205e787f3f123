"""What came out of a run, as `train` returns it and `result.json` keeps it."""

from __future__ import annotations

import dataclasses

from ml_collections import config_dict

from qlora_jax.training.workdir import Workdir


@dataclasses.dataclass(frozen=True)
class TrainResult:
    """What came out of a run; also the content of `result.json`.

    Attributes:
        workdir: where everything was written.
        steps: optimizer steps done.
        train_loss: mean loss of the last log line, nats per token; None if no step was taken.
        heldout_before: held-out loss of the base; None without held-out records.
        heldout_after: held-out loss of the adapted model.
        question: the held-out prompt that was asked, None if none was.
        answer_before: the base's reply.
        answer_after: the adapted model's reply.
        mmlu_before: share of right answers of the base; None without `eval.mmlu`, or where the run
            began with other questions.
        mmlu_after: of the adapted model.
    """

    workdir: str
    steps: int
    train_loss: float | None
    heldout_before: float | None
    heldout_after: float | None
    question: str | None
    answer_before: str | None
    answer_after: str | None
    mmlu_before: float | None = None
    mmlu_after: float | None = None


def finished_result(directory: Workdir, config: config_dict.ConfigDict) -> TrainResult | None:
    """The result of a run that has come to the end which the configuration asks for."""
    result, before = directory.read_json("result.json"), directory.read_json("config.json")
    if result is None or before is None:
        return None
    directory.check_config(config.to_dict())
    if any(before["train"][name] != config.train[name] for name in ("steps", "epochs")):
        return None
    return TrainResult(**{**result, "workdir": str(directory.path)})
