"""Lets a model answer: the newest adapter of a run on its base, or a model, or one of PEFT on it.

    python scripts/generate.py --workdir=runs/quickstart --prompt "What is the capital of France?"
    python scripts/generate.py --model=models/llama --prompt "Why?" --prompt "How?" --top_p=0.9
    python scripts/generate.py --model=models/llama --adapter=adapters/mine --prompt "Why?"

A prompt is one user's turn in the model's chat template; with --raw it is continued as it is.
"""

from absl import flags

from qlora_jax import command_line
from qlora_jax.errors import ConfigError, DataError
from qlora_jax.generation import generate
from qlora_jax.loading import load_model
from qlora_jax.peft import load_adapter
from qlora_jax.training import load_trained

_WORKDIR = flags.DEFINE_string("workdir", None, "directory of a run: its base and newest adapter")
_MODEL = flags.DEFINE_string(
    "model", None, "a model without adapter: a folder, a GGUF file, or package:<name>/<file>"
)
_ADAPTER = flags.DEFINE_string("adapter", None, "with --model: the folder of a PEFT LoRA adapter")
_PROMPT = flags.DEFINE_multi_string("prompt", None, "what to answer; can be given several times")
_RAW = flags.DEFINE_bool("raw", False, "continue the prompt as it is, without the chat template")
_QUANT_TYPE = flags.DEFINE_enum(
    "quant_type", "nf4", ["nf4", "fp4", "int4", "none"], "with --model: how to hold the weights"
)
_MAX_NEW_TOKENS = flags.DEFINE_integer(
    "max_new_tokens", 128, "longest reply, in tokens", lower_bound=1
)
_TEMPERATURE = flags.DEFINE_float(
    "temperature", 0.0, "0 takes the likeliest token every time", lower_bound=0.0
)
_TOP_K = flags.DEFINE_integer(
    "top_k", 0, "choose among so many likeliest tokens; 0: among all", lower_bound=0
)
_TOP_P = flags.DEFINE_float(
    "top_p",
    1.0,
    "choose among the fewest likeliest tokens that reach this probability",
    lower_bound=0.0,
    upper_bound=1.0,
)
_SEED = flags.DEFINE_integer("seed", 0, "of the random choices")


def main() -> None:
    """Loads, generates and prints."""
    if (_WORKDIR.value is None) == (_MODEL.value is None):
        raise ConfigError(
            "give either --workdir=runs/name (with adapter) or --model=path (without)"
        )
    if _ADAPTER.value is not None and _MODEL.value is None:
        raise ConfigError(
            "--adapter goes onto a --model; a --workdir has an adapter of its own. Give "
            "--model=path, the base of the adapter, instead"
        )
    if not _PROMPT.value:
        raise ConfigError('nothing to answer; give --prompt "..."')
    if _WORKDIR.value is not None:
        model, tokenizer = load_trained(_WORKDIR.value)
    else:
        quant_type = None if _QUANT_TYPE.value == "none" else _QUANT_TYPE.value
        model, tokenizer = load_model(_MODEL.value, quant_type=quant_type)
        if _ADAPTER.value is not None:
            model = load_adapter(model, _ADAPTER.value)
    if not _RAW.value and tokenizer.chat_template is None:
        raise DataError(
            "this model has no chat template; add --raw to continue the prompt as it is"
        )
    prompts = _PROMPT.value
    if not _RAW.value:
        prompts = [[{"role": "user", "content": prompt}] for prompt in prompts]
    replies = generate(
        model,
        tokenizer,
        prompts,
        max_new_tokens=_MAX_NEW_TOKENS.value,
        temperature=_TEMPERATURE.value,
        top_k=_TOP_K.value,
        top_p=_TOP_P.value,
        seed=_SEED.value,
    )
    for i, (prompt, reply) in enumerate(zip(_PROMPT.value, replies, strict=True)):
        if len(replies) > 1:
            print(f"{chr(10) if i else ''}> {prompt}")
        print(prompt + reply if _RAW.value else reply)


if __name__ == "__main__":
    command_line.run(main)
