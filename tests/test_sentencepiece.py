"""SentencePiece models without a tokenizer.json, against sentencepiece itself."""

import json
import shutil

import pytest
from llama_models import GOLDEN

from qlora_jax.data.sentencepiece_model import build_sentencepiece_tokenizer
from qlora_jax.data.tokenizer import Tokenizer
from qlora_jax.errors import WeightsError


def test_ids_and_texts_equal_those_of_sentencepiece():
    backend = build_sentencepiece_tokenizer(GOLDEN / "spiece.model")
    records = json.loads((GOLDEN / "spiece.json").read_text())
    assert len(records) == 8
    for record in records:
        ids = backend.encode(record["text"], add_special_tokens=False).ids
        assert ids == record["ids"], record["text"]
        if 2 not in ids:  # sentencepiece writes unknown tokens as a picture
            assert backend.decode(ids) == record["decoded"]


@pytest.mark.parametrize(
    ("model_type", "settings", "extra"),
    [("t5", {}, 100), ("mt5", {}, 0), ("mt5", {"extra_ids": 3}, 3)],
)
def test_a_folder_with_a_sentencepiece_model_is_read(tmp_path, model_type, settings, extra):
    shutil.copy(GOLDEN / "spiece.model", tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>", **settings}))
    tokenizer = Tokenizer.from_file(tmp_path)
    assert (tokenizer.eos_token_id, tokenizer.bos_token_id) == (1, None)
    assert tokenizer.vocab_size == 400 + extra
    if extra:  # the first sentinel is the last token
        assert tokenizer.encode("<extra_id_0>")[-1] == 399 + extra
    assert tokenizer.decode(tokenizer.encode("The model is loaded.")) == "The model is loaded."


def test_a_file_that_is_something_else_is_refused(tmp_path):
    raw = (GOLDEN / "spiece.model").read_bytes()
    for content in (b"", b"not a model", raw[: len(raw) // 2]):
        (tmp_path / "spiece.model").write_bytes(content)
        with pytest.raises(WeightsError, match="spiece.model is no"):
            build_sentencepiece_tokenizer(tmp_path / "spiece.model")
