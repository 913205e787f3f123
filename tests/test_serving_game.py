"""Tell them apart: anonymity, votes, and the file that the evaluation reads."""

import json
import pathlib

import numpy as np
import pytest
from fake_engine import FakeEngine
from running_server import client, running, wait_until

from qlora_jax.errors import ConfigError, DataError
from qlora_jax.evaluation import read_ratings
from qlora_jax.serving import Votes, check_playable, read_stored


def play(http, **fields):
    """A round; gives its key, the question and both texts."""
    response = http.post("/game/rounds", json=fields)
    assert response.status_code == 200, response.text
    data = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    assert data.pop() == "[DONE]"
    first, *rest = map(json.loads, data)
    texts = {"a": "", "b": ""}
    for event in rest:
        texts[event["side"]] += event.get("text", "")
    assert [e["side"] for e in rest if e.get("finish_reason")] == ["a", "b"]
    return first["round"], first["question"], texts


def vote(http, key, winner):
    return http.post("/game/votes", json={"round": key, "winner": winner})


def test_votes_are_what_the_evaluation_reads_in_the_order_that_was_shown(tmp_path):
    votes, order = tmp_path / "votes.jsonl", iter([0, 1, 0])
    engine = FakeEngine(adapters=("mine", "theirs"))
    with running(engine, votes=votes, draw=lambda n: next(order)) as (url, _), client(url) as http:
        names = []
        for models, winner in [(None, "a"), (None, "a"), (["theirs", "mine"], "tie")]:
            key, question, texts = play(http, prompt="why?", models=models)
            answer = vote(http, key, winner).json()
            names.append((answer["a"], answer["b"]))
            speakers = [{"tiny": "base"}.get(answer[side], answer[side]) for side in "ab"]
            assert [texts["a"].split(":")[0], texts["b"].split(":")[0]] == speakers
            assert question == "why?"
    assert names == [("tiny", "mine"), ("mine", "tiny"), ("theirs", "mine")]
    ratings = read_ratings(votes)
    shown = (
        [ratings.systems[i] for i in ratings.first],
        [ratings.systems[i] for i in ratings.second],
    )
    assert list(zip(*shown, strict=True)) == names
    np.testing.assert_array_equal(ratings.score, [1, 1, 0.5])
    assert set(ratings.judge) == {"human"} and len(set(ratings.question)) == 1
    record = json.loads(votes.read_text().splitlines()[0])
    assert record["answer_b"].startswith("mine: why?") and record["kind"] == "live"


def test_nothing_tells_the_names_before_the_vote(tmp_path):
    with running(votes=tmp_path / "v.jsonl") as (url, _), client(url) as http:
        response = http.post("/game/rounds", json={"prompt": "x"})
        keys = {key for line in response.text.split("\n\n")[:-2] for key in json.loads(line[6:])}
        assert keys == {"round", "question", "side", "text", "finish_reason"}


def test_who_is_first_is_drawn(tmp_path):
    with running(votes=tmp_path / "v.jsonl") as (url, _), client(url) as http:
        first = {play(http, prompt="x", max_tokens=1)[2]["a"] for _ in range(24)}
    assert first == {"base: ", "mine: "}  # fails by chance once in 8 million


def test_the_score_runs_and_goes_on_after_a_restart(tmp_path):
    votes = tmp_path / "votes.jsonl"
    for expected in (1, 2):
        with running(votes=votes, draw=lambda n: 0) as (url, _), client(url) as http:
            key, *_ = play(http, prompt="x")
            answer = vote(http, key, "b").json()
            assert answer["votes"] == expected
            assert answer["score"] == [
                {"model": "mine", "wins": expected, "ties": 0, "losses": 0},
                {"model": "tiny", "wins": 0, "ties": 0, "losses": expected},
            ]
    assert len(votes.read_text().splitlines()) == 2


def test_a_round_is_voted_on_once_and_only_when_it_is_complete(tmp_path):
    with running(votes=tmp_path / "v.jsonl") as (url, service), client(url) as http:
        key, *_ = play(http, prompt="x")
        assert vote(http, key, "neither").status_code == 400
        assert vote(http, key, "tie").status_code == 200
        assert vote(http, key, "tie").json()["error"]["code"] == "no_such_round"
        assert vote(http, ["x"], "tie").status_code == 404
        with http.stream("POST", "/game/rounds", json={"prompt": "slow"}) as response:
            lines = response.iter_lines()  # httpx hangs up when this is dropped
            first = next(lines)
            key = json.loads(first.removeprefix("data: "))["round"]
            assert vote(http, key, "a").json()["error"]["code"] == "round_not_complete"
        wait_until(lambda: service.scheduler.running == 0)
        assert len(service.engine.cancelled) == 2
        assert vote(http, key, "a").json()["error"]["code"] == "no_such_round"


@pytest.mark.parametrize(
    ("fields", "status", "message"),
    [
        ({}, 400, "prompt: is needed"),
        ({"prompt": "  "}, 400, "must be a text"),
        ({"prompt": "x", "models": ["mine"]}, 400, "two different names"),
        ({"prompt": "x", "models": ["mine", "mine"]}, 400, "two different names"),
        ({"prompt": "x", "models": ["mine", "yours"]}, 404, "there is no model 'yours'"),
        ({"prompt": "x", "modles": []}, 400, "did you mean models?"),
        ({"stored": True}, 400, "start with --answers"),
    ],
)
def test_mistakes_are_explained(tmp_path, fields, status, message):
    with running(votes=tmp_path / "v.jsonl") as (url, _), client(url) as http:
        response = http.post("/game/rounds", json=fields)
    assert response.status_code == status
    assert message in response.json()["error"]["message"]


def test_without_an_adapter_there_are_no_two(tmp_path):
    engine = FakeEngine(adapters=())
    with running(engine, votes=tmp_path / "v.jsonl") as (url, _), client(url) as http:
        response = http.post("/game/rounds", json={"prompt": "x"})
    assert "only one model here" in response.json()["error"]["message"]


def write_answers(path, prefix, count=2):
    lines = [
        {"question_id": i, "text": f"question {i}?", "generation": f" {prefix} {i}"}
        for i in range(count)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_stored_answers_play_without_a_model(tmp_path):
    one = write_answers(tmp_path / "guanaco.jsonl", "g")
    two = write_answers(tmp_path / "other.jsonl", "c", count=1)
    stored = read_stored([str(one), f"chatgpt={two}"])
    assert [question.question_id for question in stored] == ["0"]  # the one with two answers
    with running(votes=tmp_path / "v.jsonl", stored=stored) as (url, _), client(url) as http:
        assert http.get("/game").json()["stored_questions"] == 1
        key, question, texts = play(http, stored=True)
        answer = vote(http, key, "a").json()
    assert question == "question 0?"
    assert {answer["a"]: texts["a"], answer["b"]: texts["b"]} == {
        "guanaco": "g 0",
        "chatgpt": "c 0",
    }
    assert read_ratings(tmp_path / "v.jsonl").question.tolist() == ["0"]


def test_one_file_can_hold_several_systems(tmp_path):
    path = tmp_path / "all.jsonl"
    lines = [{"question": "q", "answer": name, "model": name} for name in ("x", "y", "z")]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    [question] = read_stored([str(path)])
    assert question.answers == {"x": "x", "y": "y", "z": "z"}
    with pytest.raises(DataError, match="also a model here"):
        check_playable([question], ["y"])


def test_the_authors_generations_are_read_as_they_are():
    folder = pathlib.Path(__file__).parents[2] / "shared/data/qlora_eval/vicuna_generations"
    if not folder.is_dir():
        pytest.skip("needs shared/data/qlora_eval")
    names = ("13b-guanaco", "13b-alpaca")
    stored = read_stored(
        [f"{name}={folder}/{name}-vicuna-generations-topp0.9-temp0.7.jsonl" for name in names]
    )
    assert len(stored) == 80 and all(set(one.answers) == set(names) for one in stored)
    assert stored[0].question == "How can I improve my time management skills?"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{}\n", "line 1: not an answer"),
        ("[1]\n", "line 1: not a JSON object"),
        ("no\n", "line 1: not a JSON object"),
        ("\n", "no question has the answers of two systems"),
    ],
)
def test_files_of_other_kinds_are_refused(tmp_path, text, message):
    path = tmp_path / "answers.jsonl"
    path.write_text(text)
    with pytest.raises(DataError, match=message):
        read_stored([str(path)])


def test_a_file_that_holds_something_else_gets_no_votes(tmp_path):
    other = tmp_path / "other.jsonl"
    other.write_text('{"messages": []}\n')
    with pytest.raises(DataError, match="not a verdict"):
        Votes(other)
    other.write_text('{"model_a": "x"')
    with pytest.raises(DataError, match="its last line has no end"):
        Votes(other)
    with pytest.raises(ConfigError, match="not a file in a folder that exists"):
        Votes(tmp_path / "nowhere" / "votes.jsonl")
