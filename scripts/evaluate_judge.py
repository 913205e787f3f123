"""`evaluate.py --suite=judge`: a model behind an endpoint compares the answers of systems.

    python scripts/evaluate.py --suite=judge --answers=a=a.jsonl --answers=b=b.jsonl \\
        --endpoint=http://127.0.0.1:8000/v1 --judge=llama --out=verdicts
    JUDGE_API_KEY=… python scripts/evaluate.py --suite=judge --answers=answers/ \\
        --endpoint=https://api.openai.com/v1 --judge=gpt-4o --price_in=2.5 --price_out=10 \\
        --max_cost=5 --out=verdicts
"""

import json
import pathlib
from typing import Any

from absl import flags

from qlora_jax.errors import ConfigError
from qlora_jax.evaluation import comparisons, judge_client, judge_prompts, judges
from qlora_jax.evaluation.questions import read_answers, read_questions

_ANSWERS = flags.DEFINE_multi_string(
    "answers", [], "judge: answers of systems, a file or folder, or NAME=FILE; can be repeated"
)
_ENDPOINT = flags.DEFINE_string("endpoint", None, "judge: an OpenAI-compatible address, up to /v1")
_JUDGE = flags.DEFINE_string("judge", None, "judge: what the endpoint calls the model")
_FORM = flags.DEFINE_enum(
    "verdicts", "threeclass", judge_prompts.FORMS, "judge: which is better, or points for both"
)
_PROMPTS = flags.DEFINE_string(
    "prompts", None, "judge: prompts in the QLoRA authors' form, which ask for --verdicts"
)
_SETTINGS = flags.DEFINE_string(
    "judge_settings", "{}", "judge: JSON of more fields of the requests; null takes one out"
)
_BASELINE = flags.DEFINE_string("baseline", None, "judge: compare with this system only")
_BOTH_ORDERS = flags.DEFINE_bool("both_orders", True, "judge: show each pair in both orders")
_CONCURRENCY = flags.DEFINE_integer("concurrency", 8, "judge: requests at a time", lower_bound=1)
_TIMEOUT_S = flags.DEFINE_float("timeout_s", 300.0, "judge: of a request", lower_bound=0.001)
_KEY_VARIABLE = flags.DEFINE_string(
    "key_variable", None, "judge: the environment variable with the key (JUDGE_API_KEY, if set)"
)
_PLAIN_HTTP = flags.DEFINE_bool(
    "plain_http", False, "judge: allow the key to go to another machine unencrypted"
)
_PRICE_IN = flags.DEFINE_float("price_in", None, "judge: $ for a million tokens of prompt", 0)
_PRICE_OUT = flags.DEFINE_float("price_out", None, "judge: $ for a million tokens of reply", 0)
_MAX_COST = flags.DEFINE_float("max_cost", None, "judge: $ that this call may cost", 0)
_DRY_RUN = flags.DEFINE_bool("dry_run", False, "judge: say what it would cost, and stop")


def run(out: str, data: str | None) -> None:
    """Says what it will take, asks, and says what came of it."""
    for flag in (_ENDPOINT, _JUDGE, _ANSWERS):
        if not flag.value:
            raise ConfigError(f"--suite=judge needs --{flag.name}; --help says what it is")
    if (_PRICE_IN.value is None) != (_PRICE_OUT.value is None):
        raise ConfigError("give both --price_in and --price_out, or none of them")
    prices = None
    if _PRICE_IN.value is not None:
        prices = comparisons.Prices(_PRICE_IN.value, _PRICE_OUT.value)
    if _MAX_COST.value is not None and prices is None:
        raise ConfigError("--max_cost needs --price_in and --price_out")
    endpoint = judge_client.read_endpoint(
        _ENDPOINT.value,
        key_variable=_KEY_VARIABLE.value,
        plain_http=_PLAIN_HTTP.value,
        timeout_s=_TIMEOUT_S.value,
    )
    questions = read_questions(data) if data else ()
    pairs = comparisons.pair_up(
        (answer for spec in _ANSWERS.value for answer in read_answers(spec, questions)),
        _prompts(),
        _JUDGE.value,
        settings=comparisons.SETTINGS | _settings(),
        baseline=_BASELINE.value,
        both_orders=_BOTH_ORDERS.value,
    )
    folder = pathlib.Path(out).expanduser()
    expected = comparisons.estimate(pairs, judges.known_replies(folder), prices)
    print(
        f"{expected.verdicts:,} verdicts, {expected.calls:,} calls: about "
        f"{expected.prompt_tokens:,} tokens of prompts (4 bytes a token) and "
        f"{expected.reply_tokens:,} of replies (at most {comparisons.TOKENS_A_REPLY} a reply)"
        + (f", ${expected.cost:.2f}" if prices else ""),
        flush=True,
    )
    if _DRY_RUN.value:
        return
    if _MAX_COST.value is not None and expected.cost > _MAX_COST.value:
        raise ConfigError(
            f"about ${expected.cost:.2f} is more than --max_cost={_MAX_COST.value:g}; nothing was "
            "asked"
        )
    result = judges.run_judge(
        pairs,
        endpoint,
        folder,
        form=_FORM.value,
        prices=prices,
        max_cost=_MAX_COST.value,
        concurrency=_CONCURRENCY.value,
    )
    _say(result)


def _prompts() -> dict[str, judge_prompts.JudgePrompt]:
    if _PROMPTS.value is None:
        return judge_prompts.own_prompts(_FORM.value)
    for form in judge_prompts.FORMS:
        if form in pathlib.Path(_PROMPTS.value).name and form != _FORM.value:
            raise ConfigError(
                f"{_PROMPTS.value} asks for another form than --verdicts={_FORM.value}; give "
                f"--verdicts={form}"
            )
    return judge_prompts.read_prompts(_PROMPTS.value)


def _settings() -> dict[str, Any]:
    try:
        settings = json.loads(_SETTINGS.value)
    except ValueError:
        settings = None
    if not isinstance(settings, dict):
        raise ConfigError(
            f"--judge_settings={_SETTINGS.value}: not a JSON object, such as "
            '{"max_tokens": 2048, "seed": 1}'
        )
    if fixed := sorted({"model", "messages", "stream", "n"} & set(settings)):
        raise ConfigError(f"--judge_settings cannot have {fixed[0]!r}; it is decided elsewhere")
    return settings


def _say(result: judges.JudgeResult) -> None:
    cost = "" if result.cost is None else f", ${result.cost:.2f}"
    print(
        f"wrote {result.path}: {result.verdicts:,} verdicts; {result.calls:,} calls, "
        f"{result.prompt_tokens:,} tokens of prompts, {result.reply_tokens:,} of replies{cost}"
    )
    reasons = {
        "form": "not in the form that was asked for",
        "length": "cut off; raise max_tokens in --judge_settings",
        "too_long": "too long for the judge",
    }
    for reason, count in sorted(result.unparsed.items()):
        print(f"unparsed: {count:,} ({reasons[reason]})")
