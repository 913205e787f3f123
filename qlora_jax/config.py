"""The configuration of a run: one commented base, and the checks that every run's fields pass.

A recipe is a Python file that takes the base and overrides a dozen fields:

    from qlora_jax import config as base

    def get_config():
        config = base.get_config()
        config.lora.rank = 16
        return config

The base is locked: a field that is not here cannot be set by mistake. Fields are plain numbers,
texts and truth values, so that a resolved configuration goes to JSON and comes back the same.
"""

import inspect
import json
import pathlib
import re
import runpy
import traceback

from ml_collections import config_dict

from qlora_jax import config_rules, errors, files
from qlora_jax.guarded_files import parse_json, read_limited


def get_config() -> config_dict.ConfigDict:
    """Returns the base: every field there is, with the QLoRA paper's recipe as its value.

    Example:
        >>> config = get_config()
        >>> config.lora.rank
        64
        >>> config.lora.rnak = 16
        Traceback (most recent call last):
        ...
        AttributeError: ...Did you mean "rank" instead of "rnak"?'
    """
    config = config_dict.ConfigDict()
    # Everything random in a run (order of the data, adapters, dropout, sampling) follows from it.
    config.seed = 0

    config.model = model = config_dict.ConfigDict()
    # A GGUF file, a directory of safetensors, package:<package>/<file inside it>, or a name on the
    # Hugging Face Hub: owner/name, owner/name/file.gguf, either with @revision.
    model.path = ""
    # What the frozen base is stored in: nf4 | fp4 | int4.
    model.quant_type = "nf4"
    # Weights that share one scale: 32 | 64 | 128 | 256 | 512 | 1024 | 2048 | 4096.
    model.block_size = 64
    # Quantize the scales as well: 0.37 bits a parameter less at block size 64.
    model.double_quant = True
    # What embeddings and output head are stored in: none (the compute dtype) | int8, half as much:
    # 0.24 GiB less for LLaMA-7B, 0.40 for 33B, 0.49 for 65B. It costs little in loss: the
    # quickstart ends at 1.6288 instead of 1.6268 (docs/performance.md).
    model.vocab_quant_type = "none"
    # float32 | bfloat16 | float16 | auto (what the device computes fast).
    model.compute_dtype = "auto"
    # What the backward pass recomputes: none | full | projections | dots | offload | auto. offload
    # is full with the inputs of the layers in pinned memory of the host. An input takes 2 bytes x
    # hidden size x tokens (8 GiB for a million tokens of an 8B model), which crosses to the host
    # and back once a microbatch.
    model.remat = "auto"
    # For long rows: compute a layer for this many tokens at a time, and attention for one key head
    # at a time. 0: all at once. A layer then holds about 6 arrays like its input, and of what lies
    # between them only these tokens'. Costs: nothing inside a layer is stored (projections and dots
    # mean full), weights are decoded for every chunk, and where cuDNN's attention does not run, a
    # third pass through attention. With dropout, other places are dropped than with 0. 4096 to
    # 16384 suit rows of 32k and more.
    model.sequence_chunk = 0

    config.lora = lora = config_dict.ConfigDict()
    lora.rank = 64
    # The adapter's output is scaled by alpha / rank (alpha / sqrt(rank) with use_rslora).
    lora.alpha = 16.0
    lora.use_rslora = False
    # DoRA: learn the magnitude of each output apart from its direction; weights are then decoded
    # twice in each pass (docs/lora.md).
    lora.use_dora = False
    lora.dropout = 0.0
    # How adapters begin: default (no effect) | pissa | pissa_niter_<n> | olora | loftq. All but the
    # default start from the 16-bit weights, and take time while loading (docs/lora.md).
    lora.init = "default"
    # For loftq: turns of quantizing the base and decomposing what that lost.
    lora.loftq_iterations = 1
    # all-linear (all but the output head), or a regular expression for whole parameter paths.
    lora.where = "all-linear"
    # float32 | bfloat16 | float16.
    lora.dtype = "float32"

    config.data = data = config_dict.ConfigDict()
    # A published set, read as its authors read it: oasst1 | alpaca | alpaca-clean | flan_v2 | ...
    # (docs/data.md has them all); "": records of one's own, in data.format.
    data.name = ""
    # A file or a directory of files, package:<package>/<file inside it>, a name on the hub, or
    # tfds:<name>; "": where data.name is on the hub.
    data.path = ""
    # Several sets, instead of name and path: "oasst1*2, alpaca=/data/alpaca.json*0.5" shows OASST1
    # twice an epoch, and half of Alpaca.
    data.mixture = ""
    # messages | prompt_completion | text | conversations | alpaca | input_output | mmlu_cot | auto
    # (look at the first record).
    data.format = "auto"
    # How conversations are written: model (its own template) | guanaco | alpaca | chatml | vicuna |
    # llama2 | llama3 | hh | plain | auto (as the authors of data.name, else the model's).
    data.chat_format = "auto"
    # Tokens in a sequence.
    data.max_len = 512
    # Tokens of the prompt, and of what follows it; 0: as many as fit.
    data.source_max_len = 0
    data.target_max_len = 0
    # The very tokens of the paper's code: BOS first, prompt and answer encoded apart, and both cut
    # at their ends, so that a long answer loses its end token.
    data.paper_exact = False
    # Which tokens carry loss: assistant | all | auto (as the authors of data.name, else assistant).
    data.train_on = "auto"
    # Several short records in one sequence, without attention between them. That takes a mask of
    # max_len x max_len; False takes none, which long rows cannot do without.
    data.packing = True
    # One record a sequence, records of similar length in a batch, and short batches cut short;
    # instead of packing, so it needs data.packing = False.
    data.group_by_length = False
    # Held-out records: a file of its own, or else this fraction of data.path.
    data.eval_path = ""
    data.eval_fraction = 0.1
    # Leave out records that say the same as an earlier one, before anything is held out.
    data.deduplicate = False
    # What a record that cannot be used leads to: error | skip.
    data.on_bad_record = "error"
    # 0: all of them.
    data.max_records = 0
    # Where tokens are kept, so that the next start need not tokenize again: a folder | auto
    # (~/.cache/qlora_jax/tokens) | none (not at all: they are in memory).
    data.cache_dir = "auto"

    config.optimizer = optimizer = config_dict.ConfigDict()
    # adamw | adamw8bit (moments in 8 bits: 2 bytes a parameter, not 8) | lion (one moment: 4 bytes;
    # has no eps; its paper takes a third to a tenth of AdamW's learning rate).
    optimizer.name = "adamw"
    optimizer.learning_rate = 2e-4
    # constant | linear | cosine, after the warmup.
    optimizer.schedule = "constant"
    optimizer.warmup_steps = 0
    optimizer.b1 = 0.9
    optimizer.b2 = 0.999
    optimizer.eps = 1e-8
    optimizer.weight_decay = 0.0
    # The gradient's global norm is clipped to it.
    optimizer.max_grad_norm = 0.3
    # Device memory of a step in GB (1e9 bytes); 0: what the device has. What of the optimizer's
    # state does not fit lies in the host's memory: the same result, and it crosses the bus once
    # in each direction a step.
    optimizer.device_budget_gb = 0.0
    # Where state lies in the host's memory, compare a few small steps with it to steps without, to
    # the bit, before the first: some seconds.
    optimizer.check_paging = True

    config.train = train = config_dict.ConfigDict()
    # Optimizer steps; 0: as many as the epochs make.
    train.steps = 0
    train.epochs = 1.0
    # Sequences in a microbatch, and microbatches in an optimizer step.
    train.batch_size = 1
    train.grad_accum = 16
    # Steps from one printed line to the next.
    train.log_every = 10
    # Steps in a row that are left out because loss or gradient is not a finite number; one more
    # ends the run. 0: the first does.
    train.max_skipped_steps = 5
    # Noise on the embeddings (NEFTune; 5 to 15 in its paper); 0: none.
    train.neftune_alpha = 0.0
    # Tokens whose logits exist at the same time.
    train.loss_chunk = 256

    config.eval = evaluation = config_dict.ConfigDict()
    # Steps from one held-out loss (and MMLU) to the next; 0: only before and after.
    evaluation.every = 0
    evaluation.batch_size = 4
    # MMLU, whenever the held-out loss is measured: a file or folder of questions ("": none), those
    # that are shown with their answers, five of the subject in front of each question ("": none),
    # and how many are asked, spread over the subjects (0: all).
    evaluation.mmlu = ""
    evaluation.mmlu_solved = ""
    evaluation.mmlu_max_questions = 0

    config.sample = sample = config_dict.ConfigDict()
    # Answer one held-out record before and after.
    sample.enabled = True
    sample.max_new_tokens = 128

    config.checkpoint = checkpoint = config_dict.ConfigDict()
    # Steps from one checkpoint to the next; the last step always gets one.
    checkpoint.every = 100
    # How many of the newest stay on disk.
    checkpoint.keep = 2
    # Keep the one with the lowest held-out loss, too; of those that were saved at a step of
    # eval.every.
    checkpoint.keep_best = True
    return config.lock()


def field_names() -> list[str]:
    """Returns the dotted names of all fields.

    Example:
        >>> "optimizer.learning_rate" in field_names()
        True
    """
    return list(config_rules.flatten(get_config()))


def validate(config: config_dict.ConfigDict) -> None:
    """Checks every field's name, type and range, and reports all that is wrong at once.

    Args:
        config: a whole configuration.

    Raises:
        ConfigError: a field is unknown, missing, of another type, or out of range.

    Example:
        >>> config = get_config()
        >>> config.update({"model": {"path": "m"}, "data": {"path": "d"}, "lora": {"rank": -1}})
        >>> validate(config)
        Traceback (most recent call last):
        qlora_jax.errors.ConfigError: the configuration cannot be used:
          lora.rank: got -1, needs to be at least 1
    """
    base, fields = config_rules.flatten(get_config()), config_rules.flatten(config)
    problems = config_rules.type_problems(fields, base)
    problems += [
        f"{name} is missing; start from qlora_jax.config.get_config()"
        for name in base
        if name not in fields
    ]
    # A range is only meaningful for a value of the right type.
    config_rules.raise_if_any("the configuration", problems or config_rules.range_problems(fields))


def to_json(config: config_dict.ConfigDict) -> str:
    """Returns the configuration as JSON that `load_config` reads back.

    Example:
        >>> '"rank": 64' in to_json(get_config())
        True
    """
    return json.dumps(config.to_dict(), indent=2) + "\n"


def load_config(spec: str | pathlib.Path) -> config_dict.ConfigDict:
    """Loads a configuration, without validating it.

    Args:
        spec: a `.py` file with a function `get_config()`, `file.py:text` to call
            `get_config("text")`, or a `.json` file that an earlier run wrote. A field that the JSON
            does not have keeps the base's value.

    Returns:
        The configuration, locked.

    Raises:
        ConfigError: the file cannot be run or parsed, or sets what is no field.
        UserError: there is no such file.

    Example:
        >>> import tempfile
        >>> with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        ...     _ = file.write('{"lora": {"rank": 8}}')
        ...     file.flush()
        ...     load_config(file.name).lora.rank
        8
    """
    spec = str(spec)
    python_file = re.fullmatch(r"(.*\.py)(?::(.*))?", spec, flags=re.DOTALL)
    path = files.resolve_path(python_file[1] if python_file else spec)
    if python_file:
        return _run_config_file(path, python_file[2])
    if path.suffix != ".json" or not path.is_file():
        raise errors.ConfigError(f"{spec} is no configuration; needed is a .py or a .json file")
    return _read_json(path)


def _run_config_file(path: pathlib.Path, argument: str | None) -> config_dict.ConfigDict:
    try:
        function = runpy.run_path(str(path)).get("get_config")
        if function is None:
            raise errors.ConfigError(f"{path} has no function get_config()")
        arguments = [] if argument is None else [argument]
        try:
            inspect.signature(function).bind(*arguments)
        except TypeError:
            raise errors.ConfigError(
                f"get_config{inspect.signature(function)} in {path} cannot be called with "
                f"{'nothing' if argument is None else repr(argument)} after the colon"
            ) from None
        config = function(*arguments)
    except errors.UserError:
        raise
    except Exception as error:
        raise errors.ConfigError(_explain(error, path)) from error
    if not isinstance(config, config_dict.ConfigDict):
        raise errors.ConfigError(
            f"get_config() in {path} returned {type(config).__name__}, needed is the ConfigDict "
            "of qlora_jax.config.get_config() with its changes"
        )
    return config.lock()


def _read_json(path: pathlib.Path) -> config_dict.ConfigDict:
    try:
        values = parse_json(read_limited(path))
    except ValueError as error:
        raise errors.ConfigError(f"{path} is not JSON: {error}") from None
    if not isinstance(values, dict):
        raise errors.ConfigError(f"{path} holds {type(values).__name__}, needed is an object")
    fields = config_rules.flatten(values)
    base = config_rules.flatten(get_config())
    config_rules.raise_if_any(str(path), config_rules.type_problems(fields, base))
    config = get_config()
    config.update_from_flattened_dict(fields)
    return config


def _explain(error: Exception, path: pathlib.Path) -> str:
    """Says where in the user's own file it went wrong; our frames around it do not help."""
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if frame.filename == str(path)]
    line = lines[-1] if lines else getattr(error, "lineno", None)
    where = f"{path}:{line}" if line else str(path)
    if unknown := re.search(r'Key "(\w+)" does not exist', str(error)):
        return f"{where}: {config_rules.unknown_field(unknown[1], field_names())}"
    return f"{where}: {type(error).__name__}: {error}"
