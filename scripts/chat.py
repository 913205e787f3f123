"""A chat in the terminal with what was trained, or with any model, with adapters and without.

    python scripts/chat.py --workdir=runs/quickstart
    python scripts/chat.py --model=models/llama
    python scripts/chat.py --model=models/llama --adapter=mine=adapters/a --adapter=adapters/b
    echo "Why is the sky blue?" | python scripts/chat.py --workdir=runs/quickstart

/help lists the commands: /adapter on|off and /compare show what the adapter changed. Where input is
a pipe, each line is a message, replies go to standard output and all else to standard error.
"""

import time

from absl import flags
from rich.console import Console
from rich.text import Text

from qlora_jax import command_line, model_flags
from qlora_jax.chat import Chat, Settings
from qlora_jax.chat_models import keep_compiled, load_engine, warm_up
from qlora_jax.chat_terminal import Terminal

_MODEL = model_flags.define(several=True)
_SYSTEM = flags.DEFINE_string("system", "", "the system prompt")
_MAX_LEN = flags.DEFINE_integer(
    "max_len", None, "tokens of a conversation; None: what the model sees, at most 4096", 2
)
_SETTINGS = Settings()
_TEMPERATURE = flags.DEFINE_float(
    "temperature", _SETTINGS.temperature, "0 takes the likeliest token every time", 0.0
)
_TOP_P = flags.DEFINE_float(
    "top_p", _SETTINGS.top_p, "choose among the fewest tokens that reach this probability", 0.0, 1.0
)
_MAX_NEW_TOKENS = flags.DEFINE_integer(
    "max_new_tokens", _SETTINGS.max_new_tokens, "longest reply, in tokens", 1
)
_SEED = flags.DEFINE_integer("seed", -1, "of the random choices; -1: another for each reply")


def main() -> None:
    """Loads and talks."""
    started = time.perf_counter()
    notes = Console(stderr=True, highlight=False)
    settings = Settings()
    for name, flag in [
        ("temperature", _TEMPERATURE),
        ("top_p", _TOP_P),
        ("max_new_tokens", _MAX_NEW_TOKENS),
        ("seed", _SEED),
    ]:
        settings = settings.changed(name, str(flag.value))
    keep_compiled()
    with notes.status("loading …"):
        engine, tokenizer, base_name = load_engine(
            **_MODEL.engine_arguments(),
            # A row each for the base and the adapters: /compare asks all, and each keeps what it
            # has read of the conversation.
            slots=max(1, len(_MODEL.workdir.value) + len(_MODEL.adapter.value) + 1),
            max_len=_MAX_LEN.value,
        )
        chat = Chat(engine, tokenizer, base_name=base_name, system=_SYSTEM.value, settings=settings)
        warm_up(engine, tokenizer, greedy=[settings.sampling().greedy])
    terminal = Terminal(chat)
    if terminal.at_keyboard:
        took_s = time.perf_counter() - started
        adapters = "".join(f" + {name}" for name in chat.adapters) or ", no adapter"
        notes.print(Text(f"{base_name}{adapters}, ready in {took_s:.1f} s · /help", style="dim"))
    terminal.run()


if __name__ == "__main__":
    command_line.run(main)
