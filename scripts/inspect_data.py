"""Shows what a model would be trained on: records, loss-carrying tokens, lengths, padding.

    python scripts/inspect_data.py --config=configs/smollm2_135m.py
    python scripts/inspect_data.py --data=train.jsonl --model=path/to/model
    python scripts/inspect_data.py --name=oasst1 --model=path/to/model --num=0

No weight is read, only the model's tokenizer and chat template.
"""

from absl import flags

from qlora_jax import command_line, config
from qlora_jax.data.display import print_data
from qlora_jax.data.masking import tokenize_records
from qlora_jax.data.overlap import measure_overlap
from qlora_jax.data.report import DataReport
from qlora_jax.data.tokenizer import Tokenizer
from qlora_jax.errors import ConfigError
from qlora_jax.files import resolve_path
from qlora_jax.models.t5_config import MODEL_TYPES as T5_TYPES
from qlora_jax.training.data import load_portions, token_options, with_chat_format
from qlora_jax.weights import open_checkpoint
from qlora_jax.weights.safetensors import read_json

_CONFIG = command_line.define_config(required=False)
_DATA = flags.DEFINE_string("data", None, "a data file; takes the place of config.data.path")
_MODEL = flags.DEFINE_string("model", None, "a model; takes the place of config.model.path")
_NAME = flags.DEFINE_string("name", None, "a published set; takes the place of config.data.name")
_FORMAT = flags.DEFINE_string("format", None, "takes the place of config.data.format")
_MAX_LEN = flags.DEFINE_integer("max_len", None, "takes the place of config.data.max_len")
_TRAIN_ON = flags.DEFINE_string("train_on", None, "takes the place of config.data.train_on")
_NUM = flags.DEFINE_integer("num", 3, "records to print", lower_bound=0)


def load_tokenizer(spec: str) -> Tokenizer:
    """Reads only the tokenizer of a model: of a GGUF file, or of a Hugging Face folder."""
    path = resolve_path(spec, kind="tokenizer")
    if path.is_dir() or path.suffix == ".json":
        file = (path if path.is_dir() else path.parent) / "config.json"
        if file.exists() and read_json(file, "the model's").get("model_type") in T5_TYPES:
            raise ConfigError(
                f"{spec} is an encoder-decoder; this shows rows of decoders. Train it: train.py "
                "prints a record as it is learned"
            )
        return Tokenizer.from_file(path)
    return Tokenizer.from_gguf(open_checkpoint(path).config)


def main() -> None:
    """Reads, tokenizes and prints."""
    settings = config.get_config() if _CONFIG.value is None else _CONFIG.value
    data = settings.data
    given = {"path": _DATA, "name": _NAME, "format": _FORMAT, "max_len": _MAX_LEN}
    given["train_on"] = _TRAIN_ON
    data.update({name: flag.value for name, flag in given.items() if flag.value is not None})
    settings.model.path = model = _MODEL.value or settings.model.path
    if not (data.path or data.name or data.mixture) or not model:
        raise ConfigError(
            "need --config=file.py, or --model=path with --data=file.jsonl or --name=<set>"
        )
    if _CONFIG.value is None:
        data.eval_fraction = 0.0  # a file is looked at whole
    config.validate(settings)
    tokenizer = with_chat_format(load_tokenizer(model), settings)
    report = DataReport()
    portions = load_portions(settings, report)
    examples = [
        example
        for portion in portions
        for example in tokenize_records(
            [*portion.train, *portion.heldout],
            tokenizer,
            report=report,
            on_bad_record=data.on_bad_record,
            **token_options(settings, portion.source.name),
        )
    ]
    train = [record for portion in portions for record in portion.train]
    heldout = [record for portion in portions for record in portion.heldout]
    print_data(
        examples,
        report,
        tokenizer,
        seq_len=data.max_len,
        count=_NUM.value,
        rows=settings.train.batch_size * settings.train.grad_accum,
        facts=[f"overlap         {measure_overlap(train, heldout).line()}"] if heldout else [],
    )


if __name__ == "__main__":
    command_line.run(main)
