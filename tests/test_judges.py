"""Answers in, verdicts out, by a judge on a real socket: orders, cache, interruptions, costs."""

import asyncio
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest
from fake_engine import FakeEngine
from running_server import running
from stub_judge import completion, failure, judging
from test_judge_client import KEY

from qlora_jax.errors import ConfigError, DataError, EvaluationError
from qlora_jax.evaluation import comparisons, judge_client, judges, read_ratings
from qlora_jax.evaluation.judge_client import Endpoint
from qlora_jax.evaluation.judge_prompts import own_prompts, read_prompts
from qlora_jax.evaluation.questions import Answer, Question
from qlora_jax.evaluation.ratings import position_bias, relative_scores

ROOT = pathlib.Path(__file__).parents[1]
PROMPTS = ROOT.parent / "shared" / "data" / "qlora_eval" / "prompts"
needs_prompts = pytest.mark.skipif(not PROMPTS.is_dir(), reason="needs shared/data/qlora_eval")


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    monkeypatch.setattr(judge_client, "_FIRST_PAUSE_S", 0.01)


def answers(systems="ab", questions=3):
    """Each system says its name, so that a judge can tell who is who."""
    asked = [Question(str(i), f"question {i}", (f"question {i}",)) for i in range(questions)]
    return [Answer(question, s, (f"I am {s}.",)) for question in asked for s in systems]


def shown(body):
    """The systems of a request, in their order."""
    text = body["messages"][-1]["content"]
    return sorted("abc", key=lambda s: at if (at := text.find(f"I am {s}.")) >= 0 else 1 << 30)[:2]


def likes(system):
    return lambda _, body: completion(f"Reasons.\n{shown(body).index(system) + 1}")


def judge(url, out, given=None, form="threeclass", **options):
    pairs = comparisons.pair_up(given or answers(), own_prompts(form), "m")
    return judges.run_judge(pairs, Endpoint(url), out, form=form, **options)


def test_both_orders_are_asked_and_read_as_ratings(tmp_path):
    with judging(likes("b")) as stub:
        result = judge(stub.url, tmp_path, concurrency=2)
    assert (result.verdicts, result.calls, dict(result.unparsed)) == (6, 6, {})
    assert (result.prompt_tokens, result.reply_tokens) == (600, 60)
    orders = sorted("".join(shown(body)) for body in stub.bodies)
    assert orders == ["ab"] * 3 + ["ba"] * 3
    assert {(body["model"], body["temperature"]) for body in stub.bodies} == {("m", 0.2)}
    assert 1 <= stub.most <= 2
    ratings = read_ratings(result.path)
    won = [ratings.systems[i] for i in (ratings.first * ratings.score).astype(int)]
    assert ratings.systems == ("a", "b") and set(ratings.judge) == {"m"} and len(won) == 6
    bias = position_bias(ratings)
    assert (bias.both_orders, bias.same) == (3, 1)
    summary = json.loads((tmp_path / "judge.json").read_text())
    assert summary["judge"] == "m" and summary["result"]["verdicts"] == 6


def test_a_notebook_can_ask_too(tmp_path):
    """Its cells run inside of an event loop."""

    async def cell(url):
        return judge(url, tmp_path, answers(questions=1))

    with judging(likes("b")) as stub:
        assert asyncio.run(cell(stub.url)).verdicts == 2


def test_a_rerun_is_free_and_a_new_system_costs_only_its_own_pairs(tmp_path):
    with judging(likes("b")) as stub:
        judge(stub.url, tmp_path)
        before = (tmp_path / "ratings.jsonl").read_bytes()
        (tmp_path / "ratings.jsonl").unlink()
        again = judge(stub.url, tmp_path)
        assert again.calls == 0 and len(stub.bodies) == 6
        assert (tmp_path / "ratings.jsonl").read_bytes() == before
    # Without a server at all, and at another address.
    assert judge("http://127.0.0.1:9/v1", tmp_path).verdicts == 6
    with judging(lambda *_: completion("3")) as stub:
        more = judge(stub.url, tmp_path, answers("abc"))
        assert more.calls == 12 and all("c" in shown(body) for body in stub.bodies)
        assert len(read_ratings(more.path).score) == 18
        pairs = comparisons.pair_up(answers(), own_prompts("threeclass"), "another judge")
        other = judges.run_judge(pairs, Endpoint(stub.url), tmp_path, form="threeclass")
        assert other.calls == 6


def test_what_has_no_form_is_unparsed_and_never_guessed(tmp_path):
    said = [
        completion("The first is better, so 1."),
        completion("1\n2\n3\n\n4"),
        completion("1. helpful\n1", "length"),
        failure(400, "too long", "context_length_exceeded"),
        completion(""),
        completion("Good.\n2"),
    ]
    with judging(lambda number, _: said[number]) as stub:
        result = judge(stub.url, tmp_path, concurrency=1)
    assert result.verdicts == 1
    assert result.unparsed == {"form": 3, "length": 1, "too_long": 1}
    ratings = read_ratings(result.path)
    assert (len(ratings.score), ratings.unparsed) == (1, 5)
    # What was refused for its length is asked again, elsewhere perhaps with more room.
    with judging(likes("a")) as stub:
        assert judge(stub.url, tmp_path).calls == 1


def test_points_are_read_and_compared_with_a_baseline(tmp_path):
    points = {"a": 8, "b": 9.5, "c": 8}

    def rate(_, body):
        return completion(" ".join(f"{points[s]:g}" for s in shown(body)) + "\nReasons.")

    with judging(rate) as stub:
        pairs = comparisons.pair_up(
            answers("abc"), own_prompts("relative"), "m", baseline="a", settings={"max_tokens": 9}
        )
        result = judges.run_judge(pairs, Endpoint(stub.url), tmp_path, form="relative")
    assert stub.bodies[0].keys() == {"model", "messages", "max_tokens"}
    ratings = read_ratings(result.path)
    assert result.verdicts == 12 and set(ratings.score) == {0, 0.5, 1}
    assert relative_scores(ratings, "a") == {"b": (118.75,) * 3, "c": (100,) * 3}


def test_every_turn_is_judged_with_those_before_it_in_sight(tmp_path):
    question = Question("81", "", ("one?", "two?"), category="writing")
    given = [Answer(question, s, (f"I am {s}.", f"Still {s}.")) for s in "ab"]
    with judging(likes("a")) as stub:
        result = judge(stub.url, tmp_path, given)
    texts = [body["messages"][-1]["content"] for body in stub.bodies]
    assert result.verdicts == 4
    assert sum("two?" in text for text in texts) == sum("Still a." in text for text in texts) == 2
    assert all(("last turn" in text) == ("two?" in text) and "one?" in text for text in texts)
    ratings = read_ratings(result.path)
    assert sorted(ratings.turn) == [1, 1, 2, 2] and set(ratings.question) == {"81"}
    assert position_bias(ratings).both_orders == 2


def test_categories_have_prompts_of_their_own():
    def system_of(category, own):
        question = Question("1", "q", ("q",), category=category)
        pair = [Answer(question, s, (s,)) for s in "ab"]
        return comparisons.pair_up(pair, own, "m")[0].body["messages"][-1]["content"]

    for form in ("threeclass", "relative"):
        own = own_prompts(form)
        texts = {category: system_of(category, own) for category in ("coding", "math", "generic")}
        assert len(set(texts.values())) == 3 and not any("{" in text for text in texts.values())
        assert texts["generic"] == system_of("", own)
    assert "tuple" in texts["math"] and "tuple" not in texts["coding"]


def test_braces_in_an_answer_stay():
    question = Question("1", "print {answer_2}", ("q",))
    pair = [Answer(question, s, ("{question} {0} {criteria}",)) for s in "ab"]
    text = own_prompts("threeclass")["general"].fill(*pair)[-1]["content"]
    assert "print {answer_2}" in text and text.count("{question} {0} {criteria}") == 2


@needs_prompts
def test_the_authors_prompts_are_read_as_they_are():
    for name in ("vicuna_prompt_relative", "vicuna_prompt_threeclass"):
        prompts = read_prompts(PROMPTS / f"{name}.jsonl")
        assert sorted(prompts) == ["coding", "general", "math"]
        lines = [json.loads(line) for line in (PROMPTS / f"{name}.jsonl").open()]
        pair = answers(questions=1)
        for line in lines:
            values = line["defaults"] | {"question": "question 0"}
            values |= {"answer_1": "I am a.", "answer_2": "I am b."}
            system, user = prompts[line["category"]].fill(*pair)
            assert system["content"] == line["system_prompt"]
            assert user["content"] == line["prompt_template"].format(**values)
    assert sorted(read_prompts(PROMPTS / "oa_prompt_threeclass.jsonl")) == ["general"]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"prompt_template": "{question} {answer_1}", "category": "general"}, "no {answer_2}"),
        ({"prompt_template": 1, "category": "general"}, "not a prompt"),
        (
            {"prompt_template": "{question} {answer_1} {answer_2} {ref}", "category": "general"},
            "known to put in for {ref}",
        ),
        (
            {"prompt_template": "{question} {answer_1} {answer_2}", "category": "math"},
            "no prompt for general questions",
        ),
    ],
)
def test_prompts_that_are_refused(tmp_path, record, message):
    (tmp_path / "p.jsonl").write_text(json.dumps(record))
    with pytest.raises(DataError) as error:
        read_prompts(tmp_path / "p.jsonl")
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("given", "options", "message"),
    [
        (answers("a"), {}, "all answers are of a"),
        (answers() + answers("a"), {}, "two files hold answers of a to question 0"),
        (answers("ab")[:1] + answers("ab")[3:4], {}, "no question was answered by two"),
        (answers(), {"baseline": "x"}, "the systems are a, b"),
        (
            [*answers("a", 1), Answer(Question("0", "other", ("other",)), "b", ("x",))],
            {},
            "question 0 is another one in the answers of b",
        ),
    ],
)
def test_answers_that_cannot_be_compared(given, options, message):
    with pytest.raises((DataError, ConfigError), match=message):
        comparisons.pair_up(given, own_prompts("threeclass"), "m", **options)


def test_one_order_alone_is_drawn_and_the_same_every_time():
    def orders():
        found = comparisons.pair_up(
            answers(questions=40), own_prompts("threeclass"), "m", both_orders=False
        )
        return [one.first.system for one in found]

    assert orders() == orders() and len(orders()) == 40 and 8 < orders().count("a") < 32


def test_what_was_said_before_a_failure_is_kept(tmp_path):
    dead = failure(500)
    with judging(lambda number, body: likes("a")(0, body) if number < 4 else dead) as stub:
        with pytest.raises(EvaluationError, match="failed 6 times"):
            judge(stub.url, tmp_path, concurrency=1)
    assert not (tmp_path / "ratings.jsonl").exists()
    with judging(likes("a")) as stub:
        result = judge(stub.url, tmp_path)
    assert (result.calls, result.verdicts) == (2, 6)


def test_what_is_under_way_when_another_fails_is_kept(tmp_path):
    def answer(number, body):
        if number == 0:
            time.sleep(0.2)
            return failure(401)
        if number == 1:
            time.sleep(0.6)
        return likes("a")(0, body)

    with judging(answer) as stub, pytest.raises(EvaluationError, match="HTTP 401"):
        judge(stub.url, tmp_path, concurrency=2)
    assert len(stub.bodies) == 2
    with judging(likes("a")) as stub:
        assert judge(stub.url, tmp_path).calls == 5


def test_costs_are_estimated_and_limited(tmp_path):
    pairs = comparisons.pair_up(answers(), own_prompts("threeclass"), "m")
    prices = comparisons.Prices(10, 100)
    expected = comparisons.estimate(pairs, (), prices)
    assert (expected.verdicts, expected.calls, expected.reply_tokens) == (6, 6, 1800)
    size = sum(len(m["content"]) for one in pairs for m in one.body["messages"])
    assert size / 4 <= expected.prompt_tokens <= size / 4 + 6
    assert expected.cost == pytest.approx((expected.prompt_tokens * 10 + 1800 * 100) / 1e6)
    short = comparisons.pair_up(
        answers(), own_prompts("threeclass"), "m", settings={"max_tokens": 50}
    )
    assert comparisons.estimate(short, ()).reply_tokens == 300
    with judging(likes("a")) as stub:
        # A call is 100 and 10 tokens: 0.2 cents.
        with pytest.raises(EvaluationError, match=r"\$0.01 are spent.*3 of 6 replies are kept"):
            judge(stub.url, tmp_path, prices=prices, max_cost=0.0041, concurrency=1)
        left = comparisons.estimate(pairs, judges.known_replies(tmp_path), prices)
        assert left.calls == 3
        result = judge(stub.url, tmp_path, prices=prices, max_cost=0.1)
    assert result.calls == 3 and result.cost == pytest.approx(0.006)
    assert comparisons.estimate(pairs, judges.known_replies(tmp_path)).calls == 0


class OpinionatedEngine(FakeEngine):
    """Says the same to everything."""

    def submit(self, request):
        number = super().submit(request)
        self._waiting[-1].words = ["Short ", "and ", "right.\n", "2"]
        return number


def test_our_own_server_judges(tmp_path):
    with running(OpinionatedEngine(max_len=4000)) as (url, _):
        pairs = comparisons.pair_up(answers(), own_prompts("threeclass"), "tiny")
        result = judges.run_judge(pairs, Endpoint(f"{url}/v1"), tmp_path, form="threeclass")
    assert result.verdicts == 6 and result.reply_tokens == 24
    assert position_bias(read_ratings(result.path)).always_second == 1


def run_script(*arguments, **environment):
    return subprocess.Popen(
        [sys.executable, "scripts/evaluate.py", "--suite=judge", "--judge=m", *arguments],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)} | environment,
    )


def finish(process):
    out, error = process.communicate(timeout=300)
    return process.returncode, out, error


@pytest.fixture
def files(tmp_path):
    """The flags that name two systems' answers, and the folder."""
    flags = [f"--out={tmp_path / 'out'}"]
    for system in "ab":
        records = [
            {"question_id": i, "text": f"question {i}", "generation": f"I am {system}."}
            for i in range(20)
        ]
        path = tmp_path / f"{system}.jsonl"
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        flags.append(f"--answers={path}")
    return flags


@pytest.mark.slow
def test_a_killed_run_goes_on_and_the_key_is_nowhere(files, tmp_path):
    def slowly(number, body):
        time.sleep(0.1)
        _, answer = likes("b")(number, body)
        answer["choices"][0]["message"]["content"] = (
            f"{KEY}\n" + (answer["choices"][0]["message"]["content"])
        )
        return (200, answer) if number % 3 else failure(429, KEY, Retry_After="0")

    outputs = []
    with judging(slowly) as stub:
        flags = [*files, f"--endpoint={stub.url}", "--concurrency=2", "--timeout_s=20"]
        process = run_script(*flags, JUDGE_API_KEY=KEY)
        while len(stub.bodies) < 12:
            assert process.poll() is None and time.sleep(0.02) is None
        process.send_signal(signal.SIGKILL)
        outputs += finish(process)[1:]
        kept = len(judges.known_replies(tmp_path / "out"))
        assert 3 <= kept < 40
        code, out, error = finish(run_script(*flags, JUDGE_API_KEY=KEY))
        outputs += [out, error]
        assert code == 0, error
        assert f"40 verdicts, {40 - kept} calls" in out and "40 verdicts; " in out
        asked = len(stub.bodies)
        code, out, error = finish(run_script(*flags))  # and without a key
        outputs += [out, error]
        assert code == 0 and len(stub.bodies) == asked, error
        assert all(h["authorization"] == f"Bearer {KEY}" for h in stub.headers)
    assert len(read_ratings(tmp_path / "out" / "ratings.jsonl").score) == 40
    found = [path.read_text() for path in (tmp_path / "out").iterdir()]
    assert len(found) == 3 and not any(KEY in text for text in [*found, *outputs])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--price_in=1", "--price_out=2", "--max_cost=0.001"], "is more than --max_cost=0.001"),
        (["--judge_settings={\"model\": \"x\"}"], "cannot have 'model'"),
        (["--prompts=vicuna_prompt_relative.jsonl"], "give --verdicts=relative"),
    ],
)  # fmt: skip
def test_mistakes_are_explained_before_anything_is_asked(files, tmp_path, flags, message):
    with judging(likes("a")) as stub:
        code, _, error = finish(run_script(*files, f"--endpoint={stub.url}", *flags))
    assert code == 2 and message in error and "Traceback" not in error
    assert not stub.bodies and not (tmp_path / "out").exists()
