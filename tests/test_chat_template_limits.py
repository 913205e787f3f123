"""Templates made to do harm end with one sentence, and the next conversation is rendered."""

import json
import os
import signal
import threading
import time

import pytest

from qlora_jax.data import chat_template
from qlora_jax.data.chat_template import render_chat_template, render_prefixes
from qlora_jax.errors import DataError

MESSAGES = [{"role": "user", "content": "hi"}]
PLAIN = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
LOOP = "{% for i in range(100000) %}"
DOUBLE = (
    "{% set ns = namespace(x='aaaaaaaa') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}"
)

SLOW = {
    "loops in loops": LOOP * 4 + "{% endfor %}" * 4,
    "a power": "{{ 10 ** (10 ** 9) }}",
    "a loop that writes nothing": LOOP * 3 + "{% set x = i %}" + "{% endfor %}" * 3,
}
LARGE = {
    "a text times a number": "{{ 'a' * 10**9 }}",
    "a list times a number": "{{ [1, 2] * 10**9 }}",
    "format": "{{ '%1000000000d' | format(1) }}",
    "format, as a method": "{{ '{:1000000000}'.format(1) }}",
    "center": "{{ 'a' | center(10**9) }}",
    "tabs": "{{ '\t'.expandtabs(10**9) }}",
    "doubling": DOUBLE + "{% endfor %}{{ ns.x }}",
    "indentation": "{{ [1] | tojson(indent=10**9) }}",
    "replacing": "{{ ('a' * 10**5).replace('', 'b' * 10**5) }}",
    "joining": "{{ range(100000) | join('b' * 10**5) }}",
    "a long text that fits into memory": "{{ 'a' * 10**8 }}",
    "writing in loops": LOOP * 2 + "aaaaaaaaaa" + "{% endfor %}" * 2,
    "ranges beyond the sandbox": "{{ range(10**9) | list }}",
    "words": "{{ lipsum(n=10**9) }}",
}
WRONG = {
    "recursion": "{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}",
    "recursion of a loop": "{% for x in [[1]] recursive %}{{ loop([x]) }}{% endfor %}",
    "brackets": "{{ " + "(" * 100_000 + ")" * 100_000 + " }}",
    "blocks": "{% if 1 %}" * 50_000 + "{% endif %}" * 50_000,
    "attributes of Python": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "a file": "{% include '/etc/passwd' %}",
    "changing what it was given": "{{ messages.append(1) }}",
    "a long refusal": "{{ raise_exception('a' * 10**6) }}",
    "division": "{{ 1 / 0 }}",
}


def still_renders() -> bool:
    return render_chat_template(PLAIN, MESSAGES) == "<user>hi"


@pytest.mark.parametrize("case", SLOW)
def test_a_template_that_does_not_end_is_ended(monkeypatch, case):
    monkeypatch.setattr(chat_template, "RENDER_SECONDS", 0.5)
    monkeypatch.setattr(chat_template, "_refused", set())
    assert still_renders()
    started = time.monotonic()
    with pytest.raises(DataError, match="does not end within 0.5 s.*Correct chat_template.jinja"):
        render_chat_template(SLOW[case], MESSAGES)
    ended = time.monotonic()
    with pytest.raises(DataError, match="does not end within"):  # not tried a second time
        render_chat_template(SLOW[case], MESSAGES)
    assert time.monotonic() - ended < max(0.4, (ended - started) / 2)
    assert still_renders()


@pytest.mark.parametrize("case", ["brackets", "blocks"])
def test_a_template_that_cannot_be_compiled_is_refused_alike_each_time(case):
    said = []
    for _ in range(2):
        with pytest.raises(DataError) as caught:
            render_chat_template(WRONG[case], MESSAGES)
        said.append(str(caught.value))
        assert still_renders()
    assert said[0] == said[1] and "chat template" in said[0]


@pytest.mark.parametrize("case", LARGE | WRONG)
def test_a_template_that_asks_for_too_much_is_refused(monkeypatch, case):
    monkeypatch.setattr(chat_template, "RENDER_SECONDS", 2.0)
    monkeypatch.setattr(chat_template, "_refused", set())
    with pytest.raises(DataError, match="chat template") as caught:
        render_chat_template((LARGE | WRONG)[case], MESSAGES)
    assert len(str(caught.value)) < 1000
    assert still_renders()


def test_the_process_sees_no_variables_and_writes_no_files(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setattr(chat_template, "_worker", None)
    assert still_renders()
    pid = chat_template._worker._process.pid
    with open(f"/proc/{pid}/environ") as file:
        assert "hf_secret" not in file.read()
    with open(f"/proc/{pid}/limits") as file:
        limits = {line[:26].strip(): line[26:].split()[0] for line in file}
    assert limits["Max address space"] == str(512 << 20)
    assert limits["Max file size"] == "0"


def test_prefixes_are_what_is_rendered_one_by_one():
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}] * 3
    wanted = [(n, prompt) for n in range(7) for prompt in (False, True)]
    template = PLAIN + "{% if add_generation_prompt %}>{% endif %}{{ bos_token }}"
    tokens = {"bos_token": "<s>"}
    assert render_prefixes(template, messages, wanted, special_tokens=tokens) == [
        render_chat_template(
            template, messages[:n], add_generation_prompt=prompt, special_tokens=tokens
        )
        for n, prompt in wanted
    ]
    refusing = "{% if messages | length == 3 %}{{ raise_exception('three') }}{% endif %}"
    assert render_prefixes(refusing, messages, wanted) is None
    assert render_prefixes(PLAIN, messages, [(1, False)] * 257) is None


def test_values_that_json_does_not_have_become_text():
    messages = [{"role": "user", "content": "\ud800", "n": 1, "x": None, "y": object}]
    text = render_chat_template(
        "{% for m in messages %}{{ m.content ~ m.n ~ m.y }}{% endfor %}", messages
    )
    assert text == "\ud8001<class 'object'>"


def test_a_conversation_longer_than_any_context_is_refused(monkeypatch):
    monkeypatch.setattr(chat_template, "_worker", None)
    monkeypatch.setattr(chat_template, "_MOST_REQUEST_BYTES", 1000)
    with pytest.raises(DataError, match="longer than any model's context"):
        render_chat_template(PLAIN, [{"role": "user", "content": "x" * 1000}])
    assert still_renders()


def test_threads_take_turns():
    found = {}

    def render(i):
        found[i] = [render_chat_template("{{ messages[0].n }}", [{"n": i}]) for _ in range(20)]

    threads = [threading.Thread(target=render, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {i: [str(i)] * 20 for i in range(8)}


def test_a_child_that_was_forked_has_a_process_of_its_own():
    assert still_renders()
    before = chat_template._worker._process.pid
    read, write = os.pipe()
    child = os.fork()
    if not child:
        code = 1
        try:
            done = still_renders() and chat_template._worker._process.pid != before
            os.write(write, json.dumps(done).encode())
            code = 0
        finally:
            os._exit(code)
    os.waitpid(child, 0)
    assert json.loads(os.read(read, 100)) is True
    assert still_renders() and chat_template._worker._process.pid == before


def test_ctrl_c_while_rendering_leaves_no_answer_behind(monkeypatch):
    monkeypatch.setattr(chat_template, "_refused", set())
    assert still_renders()
    timer = threading.Timer(0.3, lambda: os.kill(os.getpid(), signal.SIGINT))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        render_chat_template(SLOW["loops in loops"], MESSAGES)
    timer.join()
    assert still_renders()


def test_a_process_that_somebody_ended_is_replaced():
    assert still_renders()
    process = chat_template._worker._process
    process.kill()
    process.wait()
    assert still_renders() and chat_template._worker._process.pid != process.pid


def test_more_templates_than_a_process_keeps():
    for i in range(70):
        assert render_chat_template(f"{i}{PLAIN}", MESSAGES) == f"{i}<user>hi"
