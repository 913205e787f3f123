"""The terminal chat, with an engine that needs no model: turns, commands, pipes and a keyboard."""

import codecs
import io
import os
import pty
import select
import signal
import subprocess
import sys
import time

import pytest
from fake_engine import REPLY_WORDS, FakeEngine
from rich.cells import cell_len
from rich.console import Console

from qlora_jax.chat import Chat, Settings
from qlora_jax.chat_commands import COMMANDS, run_command
from qlora_jax.chat_models import load_engine, named_paths
from qlora_jax.chat_terminal import Terminal, WordWrap, printable
from qlora_jax.data.records import load_records
from qlora_jax.errors import CheckpointError, ConfigError, DataError, UserError

NUMBERS = " ".join(map(str, range(REPLY_WORDS)))


@pytest.fixture
def chat():
    engine = FakeEngine(adapters=("mine", "theirs"))
    settings = Settings(temperature=0)
    return Chat(engine, engine.tokenizer, base_name="tiny", settings=settings)


def say(chat, text):
    *_, reply = chat.say(text)
    return reply


def test_a_reply_grows_and_joins_the_conversation(chat):
    texts = [reply.text for reply in chat.say("hi")]
    assert texts[:2] == ["mine: ", "mine: hi "] and texts == sorted(texts, key=len)
    assert chat.messages == [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": f"mine: hi {NUMBERS}"},
    ]
    reply = say(chat, "more")
    assert (reply.tokens, reply.finish_reason) == (REPLY_WORDS + 2, "stop")
    assert reply.first_s <= reply.took_s and reply.tokens_per_s > 0
    assert len(chat.messages) == 4


def test_a_stopped_reply_stays_as_far_as_it_came(chat):
    replies = chat.say("slow")
    next(replies), next(replies)
    replies.close()
    assert chat.messages[1]["content"] == "mine: slow"
    assert say(chat, "hi").text.startswith("mine: hi")  # the engine is free again


def test_the_adapter_is_switched_by_name_or_off(chat):
    assert run_command(chat, "/adapter").text == "Adapter: off [mine] theirs"
    assert run_command(chat, "/adapter off").text == "Adapter: [off] mine theirs"
    assert say(chat, "x").text.startswith("base: x")
    run_command(chat, "/adapter theirs")
    assert say(chat, "x").text.startswith("theirs: x")
    with pytest.raises(ConfigError, match="did you mean theirs"):
        run_command(chat, "/adapter their")


def test_comparing_leaves_the_conversation_alone(chat):
    say(chat, "hi")
    outcome = run_command(chat, "/compare")
    assert outcome.compare == ("hi", (None, "mine", "theirs"))
    *_, replies = chat.compare(*outcome.compare)
    assert [reply.text.split(":")[0] for reply in replies] == ["base", "mine", "theirs"]
    assert len(chat.messages) == 2
    assert run_command(chat, "/compare why so?").compare[0] == "why so?"


def test_settings_are_checked(chat):
    assert "temperature 0.5" in run_command(chat, "/set temperature 0.5").text
    assert run_command(chat, "/set max_new_tokens=3") and say(chat, "x").finish_reason == "length"
    for line, message in [
        ("/set temprature 1", "did you mean temperature"),
        ("/set temperature hot", "needs to be a number"),
        ("/set temperature -1", "temperature must be"),
        ("/set top_k 1.5", "needs to be a whole number"),
        ("/set seed", "write the value"),
        ("/set max_new_tokens 0", "at least 1"),
    ]:
        with pytest.raises(ConfigError, match=message):
            run_command(chat, line)
    run_command(chat, "/set temperature 1")
    run_command(chat, "/set seed 7")
    run_command(chat, "/set max_new_tokens 9")
    assert "seed7" in say(chat, "x").text


def test_retry_reset_and_system(chat):
    say(chat, "hi")
    assert run_command(chat, "/retry").say == "hi" and not chat.messages
    with pytest.raises(DataError, match="nothing was said yet"):
        run_command(chat, "/retry")
    say(chat, "hi")
    run_command(chat, "/system Be brief.")
    assert (chat.system, chat.messages) == ("Be brief.", [])
    assert run_command(chat, "/system").text == "System prompt: Be brief."
    run_command(chat, "/system off")
    say(chat, "hi")
    run_command(chat, "/reset")
    assert (chat.system, chat.messages) == ("", [])


def test_what_is_saved_is_what_the_trainer_reads(chat, tmp_path):
    path = tmp_path / "chats.jsonl"
    run_command(chat, "/system Be kind.")
    for text in ("hi", 'quoted "text" and ü'):
        say(chat, text)
        outcome = run_command(chat, f"/save {path}")
    assert "(2 conversations)" in outcome.text
    records = load_records(str(path), format="auto")
    assert [len(record.messages) for record in records] == [3, 5]
    assert records[1].messages[0] == {"role": "system", "content": "Be kind."}
    assert records[1].messages[3]["content"] == 'quoted "text" and ü'
    with pytest.raises(ConfigError, match=r"ends in \.jsonl"):
        run_command(chat, "/save chats.txt")
    with pytest.raises(ConfigError, match="cannot be written"):
        run_command(chat, f"/save {tmp_path}/no/chats.jsonl")
    run_command(chat, "/reset")
    with pytest.raises(DataError, match="nothing to save"):
        run_command(chat, f"/save {path}")


def test_an_unknown_command_gets_the_nearest_name(chat):
    with pytest.raises(UserError, match="no command /compar; did you mean /compare?"):
        run_command(chat, "/compar")
    with pytest.raises(UserError, match="/help lists them"):
        run_command(chat, "/xyzzy")
    text = run_command(chat, "/help").text
    assert all(f"/{name}" in text for name in COMMANDS)


def test_a_conversation_that_is_too_long_is_refused_and_can_go_on(chat):
    with pytest.raises(ConfigError, match="/reset begins another one"):
        say(chat, "x" * 3000)
    assert chat.messages == [] and say(chat, "hi").text


def test_without_adapters_or_template_the_reason_is_said():
    engine = FakeEngine(adapters=())
    alone = Chat(engine, engine.tokenizer)
    for line in ("/adapter on", "/compare x"):
        with pytest.raises(ConfigError, match="no adapter was loaded"):
            run_command(alone, line)
    engine.tokenizer.chat_template = None
    with pytest.raises(DataError, match="no chat template"):
        Chat(engine, engine.tokenizer)


def piped(chat, text):
    out = io.StringIO()
    Terminal(chat, stdin=io.StringIO(text), console=Console(file=out)).run()
    return out.getvalue().splitlines()


def test_a_pipe_gives_replies_to_stdout_and_the_rest_to_stderr(chat, capsys):
    lines = piped(chat, "hi\n\n/adapter off\nhello\n/compare why\n/quit\nnever\n")
    assert lines == [
        f"mine: hi {NUMBERS}",
        f"base: hello {NUMBERS}",
        *("[tiny]", f"base: why {NUMBERS}"),
        *("[mine]", f"mine: why {NUMBERS}"),
        *("[theirs]", f"theirs: why {NUMBERS}"),
    ]
    notes = capsys.readouterr().err
    assert "Adapter: [off] mine theirs" in notes and "tokens/s" in notes


def test_lines_go_on_after_a_backslash_and_between_quotes(chat):
    piped(chat, 'one\\\ntwo\n"""three\n\nfour"""\n"""\nfive\n"""\n')
    users = [m["content"] for m in chat.messages if m["role"] == "user"]
    assert users == ["one\ntwo", "three\n\nfour", "five"]


def test_in_a_pipe_a_mistake_ends_the_program(chat):
    with pytest.raises(UserError, match="no command /rset"):
        piped(chat, "/rset\nhi\n")


def test_what_a_terminal_would_obey_is_left_out(chat):
    assert printable("a\x1b]0;title\x07\r\u202eb\n") == "a]0;titleb\n"
    assert piped(chat, "\x1b[2Jx\n") == [f"mine: [2Jx {NUMBERS}"]


@pytest.mark.parametrize("width", [12, 20, 33])
@pytest.mark.parametrize("piece", [1, 4, 1000])
def test_words_are_not_broken_however_they_come(width, piece):
    text = "The quick brown fox  jumps over the lazy dog,\n\n  code block\nends 漢字漢字 here."
    wrap = WordWrap(width)
    shown = "".join(wrap.add(text[i : i + piece]) for i in range(0, len(text), piece))
    shown += wrap.end()
    assert shown.split() == text.split()
    assert max(cell_len(line.rstrip()) for line in shown.split("\n")) <= width
    assert "dog,\n\n  code" in shown.replace(" \n", "\n")


@pytest.mark.parametrize(
    ("specs", "message"),
    [
        (["a/x", "b/x"], "two adapters are called 'x'"),
        (["on=a"], "cannot be a name"),
        (["=a"], "cannot be a name"),
    ],
)
def test_names_of_adapters_are_checked(specs, message):
    with pytest.raises(ConfigError, match=message):
        named_paths(specs)


class Keyboard:
    """A chat at a real pseudo-terminal."""

    def __init__(self):
        program = (
            "import sys; sys.path.insert(0, 'tests')\n"
            "from fake_engine import FakeEngine\n"
            "from qlora_jax.chat import Chat\n"
            "from qlora_jax.chat_terminal import Terminal\n"
            "engine = FakeEngine()\n"
            "Terminal(Chat(engine, engine.tokenizer)).run()\n"
            "print('left')\n"
        )
        self.master, slave = pty.openpty()
        environment = {**os.environ, "TERM": "xterm", "COLUMNS": "100", "LINES": "30"}
        self.process = subprocess.Popen(
            [sys.executable, "-c", program],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            env=environment,
            start_new_session=True,
        )
        os.close(slave)
        self.text = ""
        # What is read may end in the midst of a character.
        self.decoder = codecs.getincrementaldecoder("utf-8")()

    def type(self, text):
        os.write(self.master, text.encode())

    def interrupt(self):
        # Python's input() misses a signal between the prompt and the wait for a key; a person does
        # not hit that moment.
        time.sleep(0.5)
        self.process.send_signal(signal.SIGINT)

    def wait_for(self, text, seconds=60):
        """Waits until it appears after what was waited for before."""
        end = time.monotonic() + seconds
        while text not in self.text:
            assert time.monotonic() < end, self.text
            if select.select([self.master], [], [], 0.1)[0]:
                self.text += self.decoder.decode(os.read(self.master, 65536))
        self.text = self.text.partition(text)[2]


def test_ctrl_c_stops_the_reply_and_twice_at_an_empty_prompt_leaves():
    keyboard = Keyboard()
    try:
        keyboard.wait_for("›")
        keyboard.type("slow\n")
        keyboard.wait_for("mine: slow")
        keyboard.interrupt()
        keyboard.wait_for("stopped")
        keyboard.wait_for("›")
        keyboard.type("/rset\n")
        keyboard.wait_for("did you mean /reset?")
        keyboard.wait_for("›")
        keyboard.type("/compare why\n")
        keyboard.wait_for("base: why")
        keyboard.wait_for("›")
        keyboard.type("half a line")
        keyboard.wait_for("half a line")
        keyboard.interrupt()
        keyboard.wait_for("›")
        keyboard.interrupt()
        keyboard.wait_for("Ctrl-C again")
        keyboard.wait_for("›")
        keyboard.interrupt()
        keyboard.wait_for("left")
        assert keyboard.process.wait(20) == 0
    finally:
        keyboard.process.kill()
        os.close(keyboard.master)


def test_a_run_that_is_not_there_is_said_before_anything_is_loaded():
    with pytest.raises(CheckpointError, match="/nowhere holds no run"):
        load_engine(workdirs=["/nowhere"])


@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [
        ("chat", [], "give either --workdir=runs/name"),
        ("serve", ["--workdir=x", "--host=0.0.0.0"], "a token is needed"),
    ],
)
def test_a_mistake_is_explained_and_exits_2(script, arguments, message):
    done = subprocess.run(
        [sys.executable, f"scripts/{script}.py", *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        input="",
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert message in done.stderr and "Traceback" not in done.stderr
