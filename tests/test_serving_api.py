"""OpenAI's API over a real socket, with an engine that needs no model."""

import json
import socket
import threading

import openai
import pytest
from fake_engine import REPLY_WORDS, FakeEngine
from running_server import client, running, wait_until

from qlora_jax import serving
from qlora_jax.errors import ConfigError

HI = [{"role": "user", "content": "hi"}]
NUMBERS = "".join(f"{i} " for i in range(REPLY_WORDS))
SLOW = {"messages": [{"role": "user", "content": "slow"}], "stream": True}


@pytest.fixture(scope="module")
def server():
    with running(FakeEngine(adapters=("mine", "theirs"))) as (url, service):
        yield url, service


@pytest.fixture
def http(server):
    with client(server[0]) as http:
        yield http


def events(response):
    data = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    assert data.pop() == "[DONE]"
    return [json.loads(one) for one in data]


def chat(http, **fields):
    return http.post("/v1/chat/completions", json={"messages": HI, "temperature": 0, **fields})


def metric(http, name):
    lines = http.get("/metrics").text.splitlines()
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(name))


def test_a_chat_completion_has_the_text_and_counts_its_tokens(http):
    body = chat(http, model="tiny").json()
    [choice] = body["choices"]
    assert choice["message"] == {
        "role": "assistant",
        "content": f"base: hi {NUMBERS}",
        "refusal": None,
    }
    assert (choice["finish_reason"], body["object"]) == ("stop", "chat.completion")
    # <|im_start|> user \n h i <|im_end|> \n <|im_start|> assistant \n: one token a character
    usage = {"prompt_tokens": 1 + 5 + 2 + 1 + 1 + 1 + 10, "completion_tokens": REPLY_WORDS + 2}
    assert body["usage"] == {**usage, "total_tokens": sum(usage.values())}


def test_a_stream_says_the_same_piece_by_piece(http):
    whole = chat(http, max_tokens=5).json()
    response = chat(http, max_tokens=5, stream=True, stream_options={"include_usage": True})
    assert response.headers["content-type"].startswith("text/event-stream")
    first, *pieces, end, usage = events(response)
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    text = "".join(piece["choices"][0]["delta"]["content"] for piece in pieces)
    assert (len(pieces), text) == (5, whole["choices"][0]["message"]["content"])
    assert (end["choices"][0]["delta"], end["choices"][0]["finish_reason"]) == ({}, "length")
    assert (usage["choices"], usage["usage"]) == ([], whole["usage"])
    assert all(event["usage"] is None for event in (first, *pieces, end))


def test_without_being_asked_a_stream_counts_nothing(http):
    assert not any("usage" in event for event in events(chat(http, stream=True)))


@pytest.mark.parametrize(
    ("model", "speaker"), [("tiny", "base"), ("theirs", "theirs"), (None, "mine")]
)
def test_the_model_chooses_the_base_or_an_adapter(http, model, speaker):
    body = chat(http, model=model, max_tokens=1).json()
    assert body["choices"][0]["message"]["content"] == f"{speaker}: "


def test_models_lists_the_base_and_its_adapters(http):
    data = http.get("/v1/models").json()["data"]
    assert [(one["id"], one["parent"]) for one in data] == [
        ("tiny", None),
        ("mine", "tiny"),
        ("theirs", "tiny"),
    ]


def test_stop_and_seed(http):
    text = chat(http, stop=["1 "]).json()["choices"][0]["message"]["content"]
    assert text == "mine: hi 0 "
    seeded = [
        chat(http, temperature=1, seed=7).json()["choices"][0]["message"]["content"]
        for _ in range(2)
    ]
    assert seeded[0] == seeded[1] and "seed7" in seeded[0]
    unseeded = {chat(http, temperature=1, max_tokens=3).text for _ in range(3)}
    assert len(unseeded) == 3


def test_texts_are_continued_one_or_several_or_as_tokens(http):
    def post(prompt, **fields):
        body = {"prompt": prompt, "temperature": 0, "max_tokens": 2, **fields}
        return http.post("/v1/completions", json=body)

    assert [c["text"] for c in post(["x", "y"]).json()["choices"]] == ["mine: x ", "mine: y "]
    assert post([[ord("x") + 5], [ord("y") + 5]]).json()["choices"][1]["text"] == "mine: y "
    assert post("x", stop="x").json()["choices"][0]["finish_reason"] == "stop"
    pieces = events(post(["x", "y"], stream=True))
    texts = ["", ""]
    for piece in pieces:
        texts[piece["choices"][0]["index"]] += piece["choices"][0]["text"]
    assert texts == ["mine: x ", "mine: y "]
    long = http.post("/v1/completions", json={"prompt": "slow", "temperature": 0}).json()
    assert long["usage"]["completion_tokens"] == 16  # the API's default


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"n": 2}, "n", "one reply a prompt is made"),
        ({"temperature": 2.5}, "temperature", "must be from 0 to 2, got 2.5"),
        ({"temperature": "hot"}, "temperature", 'must be a number, got "hot"'),
        ({"temperature": True}, "temperature", "must be a number, got true"),
        ({"temperatur": 1}, "temperatur", "did you mean temperature?"),
        ({"top_p": 0}, "top_p", "must be from 1e-06 to 1"),
        ({"max_tokens": 0}, "max_tokens", "must be from 1"),
        ({"max_tokens": 9999}, "max_tokens", "at most 2048, got 9999"),
        ({"messages": []}, "messages", "at least one message"),
        ({"messages": [{"role": "dog", "content": "hi"}]}, "messages[0].role", "must be one of"),
        ({"messages": [{"role": "user"}]}, "messages[0].content", "must be a text"),
        ({"messages": "hi"}, "messages", "must be a list"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
            "messages[0].content",
            "only parts of type 'text'",
        ),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "messages[0].content", "surrogate"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "with stream: true"),
        ({"stop": [""]}, "stop", "none of them empty"),
        ({"stop": list("abcde")}, "stop", "at most 4"),
        ({"tools": [{"type": "function"}]}, "tools", "there are no tools"),
        ({"response_format": {"type": "json_object"}}, "response_format", "only"),
        ({"logprobs": True}, "logprobs", "not given"),
        ({"presence_penalty": 1}, "presence_penalty", "is not there"),
        ({"seed": 1.5}, "seed", "must be a whole number"),
        ({"stream": "yes"}, "stream", "must be true or false"),
        ({"messages": [*HI, {"role": "assistant", "content": "x"}]}, "messages", "must be the use"),
    ],
)
def test_what_cannot_be_done_is_refused_and_named(http, fields, param, message):
    body = json.dumps({"messages": HI, "temperature": 0, **fields})
    headers = {"content-type": "application/json"}
    response = http.post("/v1/chat/completions", content=body, headers=headers)
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, param)
    assert error["type"] == "invalid_request_error" and message in error["message"]


def test_a_model_that_is_not_there_is_404_with_the_nearest_name(http):
    response = chat(http, model="mime")
    assert (response.status_code, response.json()["error"]["code"]) == (404, "model_not_found")
    assert "did you mean 'mine'?" in response.json()["error"]["message"]


def test_fields_that_change_nothing_are_ignored(http):
    fields = {"user": "x", "metadata": {}, "n": 1, "tools": [], "logit_bias": {}, "top_k": -1}
    assert chat(http, **fields, response_format={"type": "text"}).status_code == 200
    parts = [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]
    response = chat(http, messages=[{"role": "user", "content": parts}], max_tokens=2)
    assert response.json()["choices"][0]["message"]["content"] == "mine: hi "


def test_a_prompt_that_does_not_fit_is_refused_with_the_numbers(http):
    response = chat(http, messages=[{"role": "user", "content": "x" * 3000}])
    error = response.json()["error"]
    assert (response.status_code, error["code"]) == (400, "context_length_exceeded")
    assert "2000 tokens" in error["message"]
    response = http.post("/v1/completions", json={"prompt": [2**30]})
    assert response.json()["error"]["param"] == "prompt"


@pytest.mark.parametrize("body", [b"", b"[1]", b"{", b'{"a": NaN}', b"\xff", b"[" * 100_000])
def test_a_body_that_is_no_json_object_is_refused(http, body):
    response = http.post(
        "/v1/completions", content=body, headers={"content-type": "application/json"}
    )
    assert (response.status_code, response.json()["error"]["code"]) == (400, "invalid_json")


def test_the_official_client_talks_to_it(server):
    with openai.OpenAI(base_url=f"{server[0]}/v1", api_key="none", max_retries=0) as official:
        assert [model.id for model in official.models.list()] == ["tiny", "mine", "theirs"]
        ask = {"model": "mine", "messages": HI, "temperature": 0, "max_tokens": 4}
        reply = official.chat.completions.create(**ask)
        assert reply.choices[0].message.content == "mine: hi 0 1 "
        assert reply.usage.completion_tokens == 4
        options = {"include_usage": True}
        chunks = list(official.chat.completions.create(**ask, stream=True, stream_options=options))
        text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
        assert (text, chunks[-1].usage) == ("mine: hi 0 1 ", reply.usage)
        text = official.completions.create(model="tiny", prompt="x", max_tokens=2).choices[0].text
        assert text == "base: x "
        with pytest.raises(openai.BadRequestError, match="one reply a prompt") as refused:
            official.chat.completions.create(**ask, n=3)
        assert refused.value.param == "n"
        with pytest.raises(openai.NotFoundError):
            official.chat.completions.create(**{**ask, "model": "gpt-4"})


def test_a_client_that_goes_away_has_its_reply_cancelled(server, http):
    engine = server[1].engine
    for path, body in [
        ("/v1/chat/completions", SLOW),
        ("/v1/chat/completions", {**SLOW, "stream": False}),
        ("/v1/completions", {"prompt": ["slow", "slow"], "max_tokens": 100}),
    ]:
        before = len(engine.cancelled)
        content = json.dumps(body).encode()
        head = (
            f"POST {path} HTTP/1.1\r\nHost: {server[0][7:]}\r\nContent-Type: application/json\r\n"
        )
        with socket.create_connection(server[0][7:].split(":")) as connection:
            connection.sendall(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
            wait_until(lambda: engine.busy)
        wait_until(lambda: not engine.busy)
        assert len(engine.cancelled) > before
    wait_until(lambda: server[1].scheduler.running == 0)
    cancelled = 'qlora_jax_replies_total{finish_reason="cancelled"'
    wait_until(lambda: metric(http, cancelled) >= 4)


def test_many_clients_share_the_slots_and_none_is_mixed_up(server):
    texts = {}

    def ask(i):
        with client(server[0]) as http:
            body = {"messages": [{"role": "user", "content": f"q{i}"}], "model": "tiny"}
            response = http.post("/v1/chat/completions", json={**body, "temperature": 0})
            texts[i] = response.json()["choices"][0]["message"]["content"]

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert texts == {i: f"base: q{i} {NUMBERS}" for i in range(16)}


def test_when_the_queue_is_full_a_request_is_refused_with_a_reason():
    engine = FakeEngine(slots=1)
    with running(engine, limits=serving.Limits(waiting=1)) as (url, service), client(url) as http:
        with (
            http.stream("POST", "/v1/chat/completions", json=SLOW),
            http.stream("POST", "/v1/chat/completions", json=SLOW),
        ):
            assert (service.scheduler.running, service.scheduler.waiting) == (1, 1)
            assert metric(http, "qlora_jax_replies_waiting") == 1
            response = chat(http)
            error = response.json()["error"]
            assert (response.status_code, error["code"]) == (429, "queue_full")
            assert error["type"] == "rate_limit_error"
            assert "1 replies are under way and 1 wait" in error["message"]
            assert 1 <= int(response.headers["retry-after"]) <= 60
            # What belongs together is taken as a whole or not at all.
            response = http.post("/v1/completions", json={"prompt": ["a", "b"]})
            assert response.status_code == 429
        wait_until(lambda: service.scheduler.running == 0)
        assert chat(http).status_code == 200
        assert metric(http, 'qlora_jax_refused_total{code="queue_full"}') == 2


def test_an_engine_that_fails_ends_the_replies_and_is_not_healthy(caplog):
    with running() as (url, service), client(url) as http:
        assert http.get("/health").json() == {"status": "ok"}
        with http.stream("POST", "/v1/chat/completions", json=SLOW) as other:
            lines = other.iter_lines()
            assert "assistant" in next(lines)
            failing = chat(http, messages=[{"role": "user", "content": "fail"}])
            rest = [line for line in lines if line]
        assert (failing.status_code, failing.json()["error"]["code"]) == (500, "engine_failed")
        assert "engine_failed" in rest[-2] and rest[-1] == "data: [DONE]"
        assert chat(http).status_code == 503
        health = http.get("/health")
        assert (health.status_code, health.json()) == (503, {"status": "failed"})
    assert "told to fail" in caplog.text  # the log has the traceback, the client has not


def test_metrics_count_requests_and_tokens(http):
    before = metric(http, 'qlora_jax_completion_tokens_total{model="theirs"}')
    count = metric(http, 'qlora_jax_responses_total{path="/v1/chat/completions",status="200"}')
    chat(http, model="theirs", max_tokens=3)
    http.get("/no/such/path")
    assert metric(http, 'qlora_jax_completion_tokens_total{model="theirs"}') == before + 3
    name = 'qlora_jax_responses_total{path="/v1/chat/completions",status="200"}'
    assert metric(http, name) == count + 1
    assert metric(http, 'qlora_jax_responses_total{path="other",status="404"}') >= 1
    assert metric(http, "qlora_jax_first_token_seconds_count") > 0
    assert metric(http, "process_resident_memory_bytes") > 0


def test_an_adapter_cannot_have_the_name_of_the_base():
    engine = FakeEngine(adapters=("tiny",))
    with pytest.raises(ConfigError, match="rename it"):
        serving.Service(engine, engine.tokenizer, base_name="tiny")
