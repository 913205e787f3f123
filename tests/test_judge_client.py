"""The client of a judge against a real server: what is tried again, what is not, and the key."""

import asyncio
import datetime
import email.utils

import pytest
from stub_judge import completion, failure, judging

from qlora_jax.errors import ConfigError, EvaluationError
from qlora_jax.evaluation import judge_client
from qlora_jax.evaluation.judge_client import Endpoint, JudgeClient, JudgeReply, read_endpoint

BODY = {"model": "m", "messages": [{"role": "user", "content": "which?"}]}
KEY = "sk-SecretOfThisTest00"
GOOD = completion("1")


def ask(answers, *, key=None, attempts=6, timeout_s=5.0):
    """Asks once; gives the reply or the error, the judge, the pauses and the reasons for them."""
    pauses, reasons = [], []

    async def sleep(seconds):
        pauses.append(seconds)

    async def once(url):
        endpoint = Endpoint(url, key, timeout_s, attempts)
        async with JudgeClient(endpoint, on_retry=reasons.append, sleep=sleep) as client:
            return await client.ask(BODY)

    with judging(lambda number, _: answers[min(number, len(answers) - 1)]) as judge:
        try:
            reply = asyncio.run(once(judge.url))
        except EvaluationError as error:
            reply = error
    return reply, judge, pauses, reasons


def test_a_reply_is_read_and_the_key_is_in_its_header():
    reply, judge, pauses, _ = ask([GOOD], key=KEY)
    assert reply == JudgeReply("1", "stop", 100, 10) and not pauses
    assert judge.bodies == [BODY]
    assert judge.headers[0]["authorization"] == f"Bearer {KEY}"
    reply, judge, *_ = ask([completion(None, "length", usage=None)])
    assert reply == JudgeReply("", "length", None, None)
    assert "authorization" not in judge.headers[0]


@pytest.mark.parametrize(
    "fault",
    [
        failure(429),
        failure(500),
        failure(503),
        failure(529),
        b"<html>busy</html>",
        b"[]",
        b'{"choices": [{"message": {"content": 3}}]}',
        b'{"error": "overloaded"}',
        0.0,  # the line is dropped
    ],
)
def test_what_can_go_better_is_tried_again(fault):
    reply, judge, pauses, reasons = ask([fault, fault, GOOD])
    assert reply.text == "1" and len(judge.bodies) == 3 and len(reasons) == 2
    assert 0.5 <= pauses[0] <= 1 <= pauses[1] <= 2


def test_a_server_that_does_not_answer_in_time_is_asked_again():
    reply, judge, pauses, reasons = ask([0.6, GOOD], timeout_s=0.3)
    assert reply.text == "1" and len(judge.bodies) == 2
    assert reasons == ["no reply in 0.3 s"]


def test_pauses_double_with_jitter_and_end():
    error, judge, pauses, _ = ask([failure(500, "out of order")])
    assert "failed 6 times in a row" in str(error) and "HTTP 500, out of order" in str(error)
    assert len(judge.bodies) == 6
    for i, pause in enumerate(pauses):
        assert 2**i / 2 <= pause <= 2**i
    assert len({pause / 2**i for i, pause in enumerate(pauses)}) > 1


def test_nobody_listens():
    async def once():
        async def sleep(_):
            pass

        async with JudgeClient(Endpoint("http://127.0.0.1:9/v1", attempts=2), sleep=sleep) as c:
            await c.ask(BODY)

    with pytest.raises(EvaluationError, match="failed 2 times in a row.*connection failed"):
        asyncio.run(once())


def test_the_server_says_how_long_to_wait():
    _, _, pauses, _ = ask([failure(429, Retry_After="7"), GOOD])
    assert 7.5 <= pauses[0] <= 8
    until = datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=40)
    date = email.utils.format_datetime(until, usegmt=True)
    _, _, pauses, _ = ask([failure(503, Retry_After=date), GOOD])
    assert 30 < pauses[0] <= 41
    error, judge, pauses, _ = ask([failure(429, "tomorrow", Retry_After="86400")])
    assert "asks to wait for 86400 s" in str(error) and len(judge.bodies) == 1 and not pauses


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (failure(401, "Incorrect API key provided"), "HTTP 401, Incorrect API key"),
        (failure(404, "no such model"), "HTTP 404, no such model"),
        (failure(400, "max_tokens is not supported"), "HTTP 400, max_tokens is not"),
        (failure(429, "You exceeded your quota", "insufficient_quota"), "exceeded your quota"),
        (failure(302, Location="http://127.0.0.1:9/"), "HTTP 302"),
    ],
)
def test_what_cannot_go_better_ends_it_at_once(fault, message):
    error, judge, pauses, _ = ask([fault])
    assert isinstance(error, EvaluationError) and message in str(error)
    assert len(judge.bodies) == 1 and not pauses


def test_what_does_not_fit_the_judge_is_a_reply():
    reply, *_ = ask([failure(400, "too many tokens", "context_length_exceeded")])
    assert reply == JudgeReply("", "too_long")


def test_the_key_is_in_no_error_and_no_reply():
    error, *_ = ask([failure(401, f"Incorrect API key provided: {KEY}")], key=KEY)
    assert "[key]" in str(error) and KEY not in repr(error)
    error, _, _, reasons = ask([failure(500, f"Bearer {KEY}")], key=KEY, attempts=2)
    assert KEY not in str(error) and KEY not in str(reasons)
    reply, *_ = ask([completion(f"your key is {KEY}\n1")], key=KEY)
    assert reply.text == "your key is [key]\n1"
    assert KEY not in repr(Endpoint("https://x/v1", KEY))


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("api.openai.com/v1", "must be like https://"),
        ("ftp://x/v1", "must be like https://"),
        ("file:///etc/passwd", "must be like https://"),
        ("https://x/v1?key=1", "must be like https://"),
        ("https://x:99999/v1", "must be like https://"),
        ("https://me:secret@x/v1", "a user or a password"),
        ("http://10.0.0.1/v1", "unencrypted"),
        ("http://localhost.example.org/v1", "unencrypted"),
    ],
)
def test_addresses_that_are_refused(monkeypatch, url, message):
    monkeypatch.setenv("JUDGE_API_KEY", KEY)
    with pytest.raises(ConfigError, match=message) as error:
        read_endpoint(url)
    assert KEY not in str(error.value) and "secret" not in str(error.value)


def test_where_the_key_comes_from(monkeypatch):
    monkeypatch.delenv("JUDGE_API_KEY", raising=False)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    assert read_endpoint("https://x/v1/").url == "https://x/v1"
    # A key that is for one host does not go to another unasked.
    assert read_endpoint("https://x/v1").key is None
    assert read_endpoint("https://x/v1", key_variable="OPENAI_API_KEY").key == KEY
    assert read_endpoint("http://x/v1").key is None
    with pytest.raises(ConfigError, match="MY_KEY is not set"):
        read_endpoint("https://x/v1", key_variable="MY_KEY")
    monkeypatch.setenv("JUDGE_API_KEY", f" {KEY}\n")
    for url in ("http://127.0.0.1:1/v1", "http://[::1]:1/v1", "http://localhost/v1"):
        assert read_endpoint(url).key == KEY
    assert read_endpoint("http://10.0.0.1/v1", plain_http=True).key == KEY
    monkeypatch.setenv("JUDGE_API_KEY", "sk-\nsecret")
    with pytest.raises(ConfigError, match="cannot be a key") as error:
        read_endpoint("https://x/v1")
    assert "secret" not in str(error.value)


def test_without_the_extra_the_command_that_installs_it_is_said(monkeypatch):
    monkeypatch.setattr(judge_client, "httpx", None)
    with pytest.raises(ConfigError, match=r'pip install "qlora-jax\[judge\]"'):
        JudgeClient(Endpoint("https://x/v1"))
