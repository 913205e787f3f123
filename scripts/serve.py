"""Serves what was trained, or any model, with its adapters: OpenAI's API, and a page to try it.

    python scripts/serve.py --workdir=runs/quickstart
    python scripts/serve.py --model=models/llama --adapter=mine=adapters/a --adapter=adapters/b
    python scripts/serve.py --workdir=runs/mine --answers=a=answers_a.jsonl --answers=b=b.jsonl
    QLORA_JAX_TOKEN=… python scripts/serve.py --workdir=runs/mine --host=0.0.0.0

It listens on 127.0.0.1 alone. For other machines give --host, and a token in the environment
variable QLORA_JAX_TOKEN, which clients send as their API key. docs/serving.md says more.
"""

import sys
import time

from absl import flags

from qlora_jax import command_line, model_flags, serving
from qlora_jax.chat_models import keep_compiled, load_engine, warm_up

_MODEL = model_flags.define(several=True)
_HOST = flags.DEFINE_string("host", "127.0.0.1", "the address to listen at")
_PORT = flags.DEFINE_integer("port", 8000, "the port to listen at; 0: any that is free", 0, 65535)
_ALLOWED_HOST = flags.DEFINE_multi_string(
    "allowed_host", [], "another name by which clients may call the server; can be repeated"
)
_SLOTS = flags.DEFINE_integer("slots", 8, "replies that are computed at the same time", 1)
_WAITING = flags.DEFINE_integer("waiting", 64, "replies that may wait for a slot; more get 429", 0)
_MAX_LEN = flags.DEFINE_integer(
    "max_len", None, "tokens of prompt and reply; None: what the model sees, at most 4096", 2
)
_MAX_NEW_TOKENS = flags.DEFINE_integer("max_new_tokens", 2048, "longest reply, in tokens", 1)
_KV_DTYPE = flags.DEFINE_enum(
    "kv_dtype", None, ["int8"], "keeps keys and values in half the memory"
)
_VOTES = flags.DEFINE_string("votes", "votes.jsonl", "where the votes of the game are appended")
_ANSWERS = flags.DEFINE_multi_string(
    "answers", [], "stored answers for the game: a JSONL file, or NAME=FILE; can be repeated"
)


def main() -> None:
    """Loads and serves."""
    started = time.perf_counter()
    # What is cheap to check comes before what takes long.
    access = serving.read_access(_HOST.value, _ALLOWED_HOST.value)
    bound = serving.bind(_HOST.value, _PORT.value)
    votes = serving.Votes(_VOTES.value)
    stored = serving.read_stored(_ANSWERS.value) if _ANSWERS.value else []
    print("loading …", file=sys.stderr)
    keep_compiled()
    engine, tokenizer, base_name = load_engine(
        **_MODEL.engine_arguments(),
        slots=_SLOTS.value,
        max_len=_MAX_LEN.value,
        kv_dtype=_KV_DTYPE.value,
    )
    limits = serving.Limits(new_tokens=_MAX_NEW_TOKENS.value, waiting=_WAITING.value)
    service = serving.Service(engine, tokenizer, base_name=base_name, limits=limits)
    serving.check_playable(stored, service.models)
    warm_up(engine, tokenizer)
    app = serving.create_app(service, access=access, game=serving.Game(service, votes, stored))
    address = serving.url(bound)
    bound.listen()  # who reads the lines below and comes at once is not refused
    print(
        f"{', '.join(service.models)}: ready in {time.perf_counter() - started:.1f} s\n"
        f"  page   {address}\n"
        f"  API    {address}/v1 (model={service.default})\n"
        f"  votes  {votes.path} ({votes.count} so far)\n"
        f"Ctrl-C stops.",
        flush=True,
    )
    serving.run(serving.Server(app, service), bound)


if __name__ == "__main__":
    command_line.run(main)
