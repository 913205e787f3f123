"""Makes spiece.model and spiece.json: a small unigram model, and the ids that it gives.

    python tests/golden/make_spiece.py README.md

Needs the package sentencepiece; the argument is a text to train on.
"""

import json
import pathlib
import sys

import sentencepiece

HERE = pathlib.Path(__file__).parent
TEXTS = [
    "The model is loaded and quantized.",
    "  Two  spaces,   and a tab\there ",
    "Ünïcödé ﬁne ① ½ – “quotes”",
    "a line\nand another one",
    "unknown: 漢字 🙂",
    "config.lora.rank=64",
    "",
]


def main(text: str) -> None:
    sentencepiece.SentencePieceTrainer.train(
        input=text,
        model_prefix=str(HERE / "spiece"),
        vocab_size=400,
        model_type="unigram",
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        user_defined_symbols=["<mark>"],
        normalization_rule_name="nmt_nfkc",
        minloglevel=2,
    )
    (HERE / "spiece.vocab").unlink()
    model = sentencepiece.SentencePieceProcessor(model_file=str(HERE / "spiece.model"))
    records = [
        {"text": text, "ids": model.encode(text), "decoded": model.decode(model.encode(text))}
        for text in [*TEXTS, "a <mark> b"]
    ]
    (HERE / "spiece.json").write_text(json.dumps(records, indent=1, ensure_ascii=False) + "\n")
    print(model.vocab_size(), [len(record["ids"]) for record in records])


if __name__ == "__main__":
    main(sys.argv[1])
