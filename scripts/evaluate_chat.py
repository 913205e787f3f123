"""`evaluate.py --suite=chat`: a model's answers to a chat benchmark, for judges and for the game.

python scripts/evaluate.py --suite=chat --workdir=runs/x --data=vicuna.jsonl --out=answers/x
"""

from absl import flags

from qlora_jax.evaluation import chat_answers, suites
from qlora_jax.generation import Sampling

_TEMPERATURE = flags.DEFINE_float("temperature", 0.7, "chat: of the answers", lower_bound=0.0)
_TOP_P = flags.DEFINE_float("top_p", 0.9, "chat: nucleus of the answers", 0.0, 1.0)
_MAX_NEW_TOKENS = flags.DEFINE_integer("max_new_tokens", 1024, "chat: of an answer", lower_bound=1)
_SLOTS = flags.DEFINE_integer("slots", 8, "chat: conversations at a time", lower_bound=1)
_SHOWN = 10


def run(candidate: suites.Candidate, data: str, *, seed: int) -> None:
    """Answers, and says how many answers there are and which questions have none."""
    result = chat_answers.run_chat(
        candidate,
        data,
        sampling=Sampling(temperature=_TEMPERATURE.value, top_p=_TOP_P.value),
        max_new_tokens=_MAX_NEW_TOKENS.value,
        slots=_SLOTS.value,
        seed=seed,
    )
    print(f"wrote {result.path}: {result.answers} answers, {result.tokens:,} tokens")
    for name, ids in [
        ("ended by the limit", result.cut),
        ("left out, too long for the model", result.too_long),
    ]:
        if ids:
            more = f", … (all in {result.path.with_name('chat.json')})" if len(ids) > _SHOWN else ""
            print(f"{name}: {len(ids)} ({', '.join(ids[:_SHOWN])}{more})")
