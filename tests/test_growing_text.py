"""The text of a reply while it grows."""

import tokenizers

from qlora_jax.data.tokenizer import Tokenizer
from qlora_jax.generation.text import GrowingText, common_prefix


def byte_tokenizer() -> Tokenizer:
    """A token for every byte, as byte-level tokenizers write characters that they do not know."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {character: i for i, character in enumerate(alphabet)}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, merges=[]))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    return Tokenizer(backend)


def spaced_tokenizer() -> Tokenizer:
    """Words with their space in front, which the decoder drops at the start of a text."""
    vocabulary = {"\u2581a": 0, "\u2581b": 1, "c": 2, "?": 3}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="?"))
    backend.decoder = tokenizers.decoders.Metaspace()
    return Tokenizer(backend)


TEXT = "na\u00efve \u65e5\u672c \U0001f600! \u00e9"


def test_no_piece_has_half_a_character():
    tokenizer = byte_tokenizer()
    ids = tokenizer.encode(TEXT)
    growing = GrowingText(tokenizer, tokenizer.encode("before \u65e5"))
    pieces = [growing.add(token) for token in ids]
    assert len(ids) == len(TEXT.encode()) and "".join(pieces) == TEXT
    assert "\ufffd" not in "".join(pieces) and growing.finish() == ""
    # A reply that is cut in the middle of a character says so at its end, and only there.
    growing = GrowingText(tokenizer, [])
    assert [growing.add(token) for token in tokenizer.encode("a\u65e5")[:3]] == ["a", "", ""]
    assert growing.finish() == "\ufffd"


def test_a_prompt_that_ends_in_half_a_character_is_continued():
    tokenizer = byte_tokenizer()
    ids = tokenizer.encode("\u65e5b")
    growing = GrowingText(tokenizer, ids[:1])
    text = "".join(growing.add(token) for token in ids[1:]) + growing.finish()
    assert text.endswith("b")


def test_a_space_between_prompt_and_reply_stays():
    growing = GrowingText(spaced_tokenizer(), [0])
    assert [growing.add(token) for token in (1, 2, 0)] == [" b", "c", " a"]


def test_a_stop_string_over_the_borders_of_tokens():
    tokenizer = byte_tokenizer()
    growing = GrowingText(tokenizer, [], stop=["### Human", "\u65e5\u672c"])
    text = ""
    for token in tokenizer.encode("one ## two #### Human three"):
        text += growing.add(token)
    assert text == "one ## two #" and growing.stopped and growing.finish() == ""
    growing = GrowingText(tokenizer, [], stop=["### Human", "\u65e5\u672c"])
    text = "".join(
        growing.add(token) for token in tokenizer.encode("a \u65e5\u6708 \u65e5\u672c b")
    )
    assert text == "a \u65e5\u6708 " and growing.stopped


def test_what_was_held_back_comes_at_the_end():
    tokenizer = byte_tokenizer()
    growing = GrowingText(tokenizer, [], stop=["###"])
    assert [growing.add(token) for token in tokenizer.encode("a##")] == ["a", "", ""]
    assert growing.finish() == "##" and not growing.stopped


def test_common_prefix():
    assert common_prefix([], [1]) == 0
    assert common_prefix([1, 2], [1, 2, 3]) == 2
