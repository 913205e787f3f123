"""Lets a model answer: the newest adapter of a run on its base, or a model, or one of PEFT on it.

    python scripts/generate.py --workdir=runs/quickstart --prompt "What is the capital of France?"
    python scripts/generate.py --model=models/llama --prompt "Why?" --prompt "How?" --top_p=0.9
    python scripts/generate.py --model=models/llama --adapter=adapters/mine --prompt "Why?"

A prompt is one user's turn in the model's chat template; with --raw it is continued as it is. A
single reply is printed while it grows. To talk, see scripts/chat.py.
"""

from absl import flags
from flax import nnx

from qlora_jax import command_line, model_flags
from qlora_jax.data.tokenizer import Tokenizer
from qlora_jax.errors import ConfigError, DataError
from qlora_jax.generation import Engine, Sampling, generate, stream
from qlora_jax.generation.batches import Prompt
from qlora_jax.models.t5 import T5

_MODEL = model_flags.define()
_PROMPT = flags.DEFINE_multi_string("prompt", None, "what to answer; can be given several times")
_RAW = flags.DEFINE_bool("raw", False, "continue the prompt as it is, without the chat template")
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
_MIN_P = flags.DEFINE_float(
    "min_p",
    0.0,
    "choose among the tokens with this share of the likeliest one's probability",
    lower_bound=0.0,
    upper_bound=1.0,
)
_REPETITION_PENALTY = flags.DEFINE_float(
    "repetition_penalty", 1.0, "above 1: tokens of prompt and reply become less likely"
)
_SEED = flags.DEFINE_integer("seed", 0, "of the random choices")


def main() -> None:
    """Loads, generates and prints."""
    if not _PROMPT.value:
        raise ConfigError('nothing to answer; give --prompt "..."')
    model, tokenizer = _MODEL.load()
    if not _RAW.value and tokenizer.chat_template is None:
        raise DataError(
            "this model has no chat template; add --raw to continue the prompt as it is"
        )
    prompts = _PROMPT.value
    if not _RAW.value:
        prompts = [[{"role": "user", "content": prompt}] for prompt in prompts]
    sampling = Sampling(
        _TEMPERATURE.value,
        _TOP_K.value,
        _TOP_P.value,
        _MIN_P.value,
        _REPETITION_PENALTY.value,
    )
    if len(prompts) == 1 and not isinstance(model, T5):
        _print_growing(model, tokenizer, prompts[0], sampling)
    else:
        _print_all(model, tokenizer, prompts, sampling)


def _print_growing(
    model: nnx.Module, tokenizer: Tokenizer, prompt: Prompt, sampling: Sampling
) -> None:
    engine = Engine(model, tokenizer, slots=1)
    pieces = stream(
        engine,
        prompt,
        max_new_tokens=_MAX_NEW_TOKENS.value,
        sampling=sampling,
        seed=_SEED.value,
        adapter=next(iter(engine.adapters), None),
    )
    print(prompt if _RAW.value else "", end="", flush=True)
    for text in pieces:
        print(text, end="", flush=True)
    print()


def _print_all(
    model: nnx.Module, tokenizer: Tokenizer, prompts: list[Prompt], sampling: Sampling
) -> None:
    replies = generate(
        model,
        tokenizer,
        prompts,
        max_new_tokens=_MAX_NEW_TOKENS.value,
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        min_p=sampling.min_p,
        repetition_penalty=sampling.repetition_penalty,
        seed=_SEED.value,
    )
    for i, (prompt, reply) in enumerate(zip(_PROMPT.value, replies, strict=True)):
        if len(replies) > 1:
            print(f"{chr(10) if i else ''}> {prompt}")
        print(prompt + reply if _RAW.value else reply)


if __name__ == "__main__":
    command_line.run(main)
