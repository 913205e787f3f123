"""Loss masks: exact for every template, and truncation that keeps the end token."""

import fake_tokenizer as fake
import numpy as np
import pytest
from fake_tokenizer import FakeTokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_jax.data.formats import Record, pair
from qlora_jax.data.masking import Turn, assemble, tokenize_records
from qlora_jax.data.report import DataReport
from qlora_jax.data.spans import encode_pieces
from qlora_jax.errors import DataError


def chat(*contents, system=None, record_id="chat.jsonl:1"):
    roles = ["user", "assistant"] * len(contents)
    messages = [{"role": r, "content": c} for r, c in zip(roles, contents, strict=False)]
    if system is not None:
        messages.insert(0, {"role": "system", "content": system})
    return Record(record_id, "messages", tuple(messages))


def learned(example, tokenizer):
    """The texts of the runs of tokens that carry loss."""
    runs, previous = [], -2
    for position in np.flatnonzero(example.loss_mask):
        if position != previous + 1:
            runs.append([])
        runs[-1].append(example.tokens[position])
        previous = position
    return [tokenizer.decode(run, skip_special_tokens=False) for run in runs]


def tokenize(record, tokenizer, max_len=10_000, **options):
    return tokenize_records([record], tokenizer, max_len, **options)[0]


DIALOGUE = chat("Hi", "Hello there", "Bye", "So long")


@pytest.mark.parametrize(
    "template, expected",
    [
        (fake.CHATML, ["Hello there<|im_end|>", "So long<|im_end|>"]),
        (fake.LLAMA2, [" Hello there </s>", " So long </s>"]),
        (fake.LLAMA3, ["Hello there<|eot_id|>", "So long<|eot_id|>"]),
        (fake.VICUNA, [" Hello there</s>", " So long</s>"]),
        # No end token: what ends the turn is the line break, and it is learned.
        (fake.GUANACO, [" Hello there\n", " So long\n"]),
        (fake.THINKING, ["Hello there<|im_end|>", "<think>\n\n</think>\n\nSo long<|im_end|>"]),
        (fake.TRAILING_SPACE, ["Hello there</s>", "So long</s>"]),
    ],
)
def test_only_answers_and_their_end_carry_loss(template, expected):
    tokenizer = FakeTokenizer(template)
    example = tokenize(DIALOGUE, tokenizer)
    assert learned(example, tokenizer) == expected
    text = tokenizer.apply_chat_template(DIALOGUE.messages)
    whole = tokenizer.encode(text)
    assert example.tokens.tolist() == whole[: len(example.tokens)]
    assert not tokenizer.decode(whole[len(example.tokens) :]).strip()


def test_a_system_message_is_context():
    tokenizer = FakeTokenizer()
    example = tokenize(chat("Hi", "Hello", system="Be kind."), tokenizer)
    assert learned(example, tokenizer) == ["Hello<|im_end|>"]
    assert "Be kind." in tokenizer.decode(example.tokens)


def test_a_question_that_contains_the_answer_or_the_markup_confuses_nothing():
    tokenizer = FakeTokenizer()
    question = "Say: yes<|im_end|>\n<|im_start|>assistant\nyes"
    example = tokenize(chat(question, "yes", question, "yes"), tokenizer)
    assert learned(example, tokenizer) == ["yes<|im_end|>"] * 2


@pytest.mark.parametrize("answer", ["_", "im_end", "<|im_end|>", "answer", "\n"])
def test_a_shortened_answer_that_looks_like_the_markup_is_found(answer):
    tokenizer = FakeTokenizer(fake.THINKING)
    example = tokenize(chat("Hi", answer, "Bye", "x"), tokenizer)
    assert learned(example, tokenizer)[0] == answer + "<|im_end|>"


def test_an_end_token_inside_the_answer_is_not_its_end():
    tokenizer = FakeTokenizer()
    example = tokenize(chat("Write ChatML", "a<|im_end|>\nb"), tokenizer)
    assert learned(example, tokenizer) == ["a<|im_end|>\nb<|im_end|>"]


CONTENT = st.text(st.characters(codec="utf-8", exclude_characters="\0<"), min_size=1, max_size=12)


# What each template writes around an answer: before earlier ones, before the last one, after all.
AROUND = {
    fake.CHATML: ("", "", "<|im_end|>"),
    fake.VICUNA: (" ", " ", "</s>"),
    fake.THINKING: ("", "<think>\n\n</think>\n\n", "<|im_end|>"),
    fake.TRAILING_SPACE: ("", "", "</s>"),
}


@settings(deadline=None)
@given(
    st.lists(st.tuples(CONTENT, CONTENT), min_size=1, max_size=3),
    st.sampled_from(sorted(AROUND)),
    st.lists(st.text("abn :\n", min_size=2, max_size=3), max_size=4),
)
def test_what_is_learned_is_the_answers_whatever_the_tokenizer_merges(pairs, template, words):
    tokenizer = FakeTokenizer(template, words=tuple(dict.fromkeys(words)))
    example = tokenize(chat(*(c for pair in pairs for c in pair)), tokenizer)
    before, before_last, after = AROUND[template]
    expected = [before + answer + after for _, answer in pairs[:-1]]
    assert learned(example, tokenizer) == [*expected, before_last + pairs[-1][1] + after]


def test_a_border_inside_a_token_is_cut_where_generation_cuts_it():
    tokenizer = FakeTokenizer(fake.TRAILING_SPACE, words=(" H", "A: "))
    example = tokenize(chat("x", "Hi"), tokenizer)
    prompt = tokenizer.encode("Q: x</s>A: ")
    assert example.tokens.tolist() == prompt + tokenizer.encode("Hi</s>")
    assert example.loss_mask.tolist() == [0] * len(prompt) + [1, 1, 1]


def test_a_tokenizer_that_adds_a_space_is_given_whole_texts():
    tokenizer = FakeTokenizer(fake.LLAMA2, dummy_prefix=True)
    text = "<s>[INST] x [/INST] Hi </s>"
    start = text.index(" Hi")
    pieces = encode_pieces(text, [(start, len(text))], tokenizer)
    assert pieces[0] + pieces[1] == tokenizer.encode(text)
    assert len(pieces[1]) == len(" Hi ") + 1


def test_a_border_that_cannot_be_encoded_is_refused():
    tokenizer = FakeTokenizer(fake.TRAILING_SPACE, words=(" H",), dummy_prefix=True)
    with pytest.raises(DataError, match="chat.jsonl:1: messages: found a border .* inside a token"):
        tokenize(chat("x", "Hi"), tokenizer)


def test_a_template_that_is_not_prefix_stable_is_refused_with_the_way_out():
    tokenizer = FakeTokenizer(fake.UNSTABLE)
    with pytest.raises(DataError, match=r'chat.jsonl:1: messages\[1\]: .*train_on="all"'):
        tokenize(DIALOGUE, tokenizer)
    example = tokenize(DIALOGUE, tokenizer, train_on="all")
    assert example.loss_mask.tolist() == [0] + [1] * (len(example.tokens) - 1)


def test_a_template_that_refuses_a_record_names_it_or_is_skipped():
    template = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    tokenizer = FakeTokenizer(template + fake.CHATML)
    bad = chat("Hi", "Hello", system="x", record_id="chat.jsonl:7")
    with pytest.raises(DataError, match=r"chat.jsonl:7: messages: .*no system"):
        tokenize(bad, tokenizer)
    report = DataReport()
    records = [DIALOGUE, bad]
    examples = tokenize_records(records, tokenizer, 100, on_bad_record="skip", report=report)
    assert len(examples) == 1
    assert report.skipped == 1 and "chat.jsonl:7" in report.samples[0]


def test_train_on_all_spares_only_the_first_token():
    tokenizer = FakeTokenizer()
    example = tokenize(DIALOGUE, tokenizer, train_on="all")
    assert example.loss_mask[0] == 0 and example.loss_mask[1:].all()
    assert tokenizer.decode(example.tokens, skip_special_tokens=False).endswith("So long<|im_end|>")


def test_prompt_and_completion_without_a_chat_template_are_joined():
    record = Record("a.jsonl:1", "prompt_completion", **pair("2+2=", "4"))
    tokenizer = FakeTokenizer(None, add_bos_token=True)
    example = tokenize(record, tokenizer)
    assert tokenizer.decode(example.tokens, skip_special_tokens=False) == "<s>2+2=4<|im_end|>"
    assert learned(example, tokenizer) == ["4<|im_end|>"]


def test_a_conversation_without_a_chat_template_is_refused():
    with pytest.raises(DataError, match="no chat template"):
        tokenize(DIALOGUE, FakeTokenizer(None))


def test_text_is_learned_whole_and_closed():
    tokenizer = FakeTokenizer(add_bos_token=True)
    example = tokenize(Record("a.jsonl:1", "text", text="abc"), tokenizer)
    assert tokenizer.decode(example.tokens, skip_special_tokens=False) == "<s>abc<|im_end|>"
    assert example.loss_mask.tolist() == [0, 1, 1, 1, 1]
    short = tokenize(Record("a.jsonl:1", "text", text="abc"), tokenizer, max_len=3)
    assert tokenizer.decode(short.tokens, skip_special_tokens=False) == "<s>a<|im_end|>"


@pytest.mark.parametrize("max_len", range(3, 90))
def test_truncation_keeps_the_end_token_and_whole_turns(max_len):
    tokenizer = FakeTokenizer()
    report = DataReport()
    full = tokenize(DIALOGUE, tokenizer)
    try:
        example = tokenize(DIALOGUE, tokenizer, max_len=max_len, report=report)
    except DataError:
        assert max_len < len("xuser\nHix\nxassistant\n") + 2
        return
    assert len(example.tokens) <= max_len
    assert example.tokens[-1] == tokenizer.eos_token_id and example.loss_mask[-1] == 1
    assert example.truncated == (len(full.tokens) > max_len) == bool(report.truncated)
    assert example.tokens[:-1].tolist() == full.tokens[: len(example.tokens) - 1].tolist()
    answers = [text.removesuffix("<|im_end|>") for text in learned(example, tokenizer)]
    for answer, whole in zip(answers, ["Hello there", "So long"], strict=False):
        assert answer and whole.startswith(answer)


def test_truncation_without_an_end_token_cuts_plainly():
    example = assemble([Turn([1], [2, 3, 4], closed=False)], 3, "a:1")
    assert example.tokens.tolist() == [1, 2, 3]
    assert example.truncated


def test_a_prompt_that_leaves_no_room_is_dropped_counted_and_reported():
    tokenizer, report = FakeTokenizer(), DataReport()
    long = chat("x" * 50, "y", record_id="chat.jsonl:2")
    examples = tokenize_records([DIALOGUE, long], tokenizer, 60, report=report)
    assert [example.record_id for example in examples] == ["chat.jsonl:1"]
    assert report.dropped == 1
    assert "chat.jsonl:2: tokens: found a prompt of 69" in report.samples[0]


def test_a_set_without_any_loss_is_refused_with_a_sample():
    with pytest.raises(DataError) as caught:
        tokenize_records([chat("x" * 50, "y")] * 3, FakeTokenizer(), 40)
    message = str(caught.value)
    assert "no token of any of the 3 records carries loss" in message
    assert "chat.jsonl:1: tokens: found a prompt of 69" in message
    assert "| <|im_start|>user" in message and "raise max_len" in message


@pytest.mark.parametrize("options", [{"max_len": 2}, {"max_len": 9, "train_on": "user"}])
def test_impossible_settings_are_refused(options):
    with pytest.raises(DataError, match=r"max_len=2|train_on='user'"):
        tokenize(DIALOGUE, FakeTokenizer(), **options)


def test_skips_are_logged_when_nobody_takes_the_report(caplog):
    tokenize_records([DIALOGUE, chat("x" * 99, "y")], FakeTokenizer(), 60)
    assert "2 records read, 0 skipped, 1 truncated, 1 dropped" in caplog.text


def test_source_and_target_have_limits_of_their_own():
    tokenizer = FakeTokenizer(None, add_bos_token=True)
    record = Record("a.jsonl:1", "alpaca", **pair("question ends: ", "a long answer"))
    example = tokenize(record, tokenizer, source_max_len=8, target_max_len=5)
    whole = tokenize(record, tokenizer)
    # BOS and the end of the prompt stay, and the end token of the answer.
    assert tokenizer.decode(example.tokens, skip_special_tokens=False) == "<s> ends: a lo<|im_end|>"
    assert learned(example, tokenizer) == ["a lo<|im_end|>"]
    assert example.truncated and not whole.truncated
    assert tokenize(record, tokenizer, source_max_len=16, target_max_len=14).tokens.tolist() == (
        whole.tokens.tolist()
    )
    only_source = tokenize(record, tokenizer, source_max_len=4)
    assert only_source.truncated and learned(only_source, tokenizer) == ["a long answer<|im_end|>"]
    tight = tokenize(record, tokenizer, max_len=12, source_max_len=8)
    assert len(tight.tokens) == 12 and tight.tokens[-1] == tokenizer.eos_token_id


def test_the_target_of_a_conversation_is_all_that_follows_the_first_prompt():
    tokenizer = FakeTokenizer()
    example = tokenize(DIALOGUE, tokenizer, target_max_len=20)
    assert learned(example, tokenizer) == ["Hello there<|im_end|>"]
    whole = tokenize(DIALOGUE, tokenizer)
    prompt = int(np.flatnonzero(whole.loss_mask)[0])
    assert len(example.tokens) <= prompt + 20 and example.truncated


def test_the_papers_cut_loses_the_end_token_and_the_end_of_the_prompt():
    tokenizer = FakeTokenizer(None)
    record = Record("a.jsonl:1", "alpaca", **pair("question ends: ", "a long answer"))
    options = dict(paper_exact=True, source_max_len=9, target_max_len=6)
    example = tokenize(record, tokenizer, **options)
    assert tokenizer.decode(example.tokens, skip_special_tokens=False) == "<s>questiona long"
    assert learned(example, tokenizer) == ["a long"] and example.truncated
    on_source = tokenize(record, tokenizer, train_on="all", **options)
    assert on_source.tokens.tolist() == example.tokens.tolist()
    assert on_source.loss_mask.tolist() == [0] + [1] * 14
    fits = tokenize(record, tokenizer, paper_exact=True, source_max_len=16, target_max_len=14)
    assert learned(fits, tokenizer) == ["a long answer<|im_end|>"] and not fits.truncated
    with pytest.raises(DataError, match="without literal text, need a set of the paper"):
        tokenize(DIALOGUE, tokenizer, **options)


def test_loss_on_the_source_changes_no_token():
    tokenizer = FakeTokenizer(None)
    record = Record("a.jsonl:1", "alpaca", **pair("Q: ", "A"))
    answer, everything = (tokenize(record, tokenizer, train_on=on) for on in ("assistant", "all"))
    assert answer.tokens.tolist() == everything.tokens.tolist()
    assert everything.loss_mask.tolist() == [0, 1, 1, 1, 1]


def test_literal_text_is_preferred_only_when_asked_for():
    tokenizer = FakeTokenizer()
    record = Record("a.jsonl:1", "alpaca", **pair("### Q: Hi\n", "Oh", question="Hi"))
    template, literal = (tokenize(record, tokenizer, literal=value) for value in (False, True))
    assert "<|im_start|>user\nHi" in tokenizer.decode(template.tokens, skip_special_tokens=False)
    assert tokenizer.decode(literal.tokens) == "### Q: Hi\nOh"
    assert learned(literal, tokenizer) == ["Oh<|im_end|>"]


def test_a_border_that_the_tokenizer_cannot_keep_is_encoded_apart():
    """SentencePiece sets a space before every text, also before an answer behind a space."""
    tokenizer = FakeTokenizer(None, dummy_prefix=True, words=(" A",))
    record = Record("a.jsonl:1", "alpaca", **pair("Response: ", "A"))
    example = tokenize(record, tokenizer)
    assert learned(example, tokenizer) == ["A<|im_end|>"]
