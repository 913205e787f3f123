"""The `tokenizers` pipeline of a SentencePiece unigram model (`spiece.model`), which T5 and mT5
bring where they have no `tokenizer.json`.

The file is a protocol buffer, of which a few fields are needed; so it is read here, in a few lines,
and neither `sentencepiece` nor `protobuf` has to be installed:

    ModelProto:      1 pieces (repeated), 2 trainer_spec, 3 normalizer_spec
    SentencePiece:   1 piece, 2 score (float), 3 type
    TrainerSpec:     3 model_type (1: unigram), 35 byte_fallback, 40 unk_id
    NormalizerSpec:  2 precompiled_charsmap

(google/sentencepiece, `src/sentencepiece_model.proto`.) The pipeline is the one that transformers
makes of such a file.
"""

import pathlib
import struct
from collections.abc import Iterator
from typing import Any

import tokenizers
from tokenizers import decoders, normalizers, pre_tokenizers

from qlora_jax.errors import WeightsError

_UNIGRAM = 1
# `SentencePiece.type`: unknown and control tokens, and what whoever trained the model defined.
_UNKNOWN, _SPECIAL, _USER_DEFINED = 2, (2, 3), 4


def build_sentencepiece_tokenizer(path: pathlib.Path, extra_ids: int = 0) -> tokenizers.Tokenizer:
    """Builds the pipeline of a unigram model.

    Args:
      path: `spiece.model`.
      extra_ids: T5's sentinels `<extra_id_0>`, ..., which are not in the file; they come last, and
        the last of them first.

    Raises:
      WeightsError: the file is damaged, or no unigram model.
    """
    try:
        model = list(_fields(path.read_bytes()))
        pieces = [dict(_fields(value)) for number, value in model if number == 1]
        trainer = dict(_fields(next((v for n, v in model if n == 2), b"")))
        normalizer = dict(_fields(next((v for n, v in model if n == 3), b"")))
        vocabulary = [
            (piece[1].decode(), struct.unpack("<f", piece.get(2, bytes(4)))[0]) for piece in pieces
        ]
    except OSError as error:
        raise WeightsError(f"{path} cannot be read: {error.strerror}") from None
    except (LookupError, ValueError, AttributeError, TypeError, struct.error):
        raise WeightsError(f"{path} is no SentencePiece model. Download it again.") from None
    if not pieces or trainer.get(3, _UNIGRAM) != _UNIGRAM:
        raise WeightsError(
            f"{path} is no unigram model of SentencePiece, the kind that T5 and mT5 have. Convert "
            "it in an environment with transformers: "
            "`AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)`."
        )
    kinds = [piece.get(3, 1) for piece in pieces]
    special = [text for (text, _), kind in zip(vocabulary, kinds, strict=True) if kind in _SPECIAL]
    written = [
        text for (text, _), kind in zip(vocabulary, kinds, strict=True) if kind == _USER_DEFINED
    ]
    sentinels = [f"<extra_id_{i}>" for i in reversed(range(extra_ids))]
    backend = tokenizers.Tokenizer(
        tokenizers.models.Unigram(
            vocabulary + [(text, 0.0) for text in sentinels],
            unk_id=kinds.index(_UNKNOWN) if _UNKNOWN in kinds else None,
            byte_fallback=bool(trainer.get(35, 0)),
        )
    )
    steps = [normalizers.Strip(left=False), normalizers.Replace(tokenizers.Regex(" {2,}"), "▁")]
    if charsmap := normalizer.get(2):
        steps.insert(0, normalizers.Precompiled(charsmap))
    backend.normalizer = normalizers.Sequence(steps)
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    backend.add_special_tokens(special + sentinels)
    backend.add_tokens(written)
    return backend


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """The fields of one message of a protocol buffer: number, and an integer or bytes.

    >>> list(_fields(bytes([0x08, 0x96, 0x01, 0x12, 0x02]) + b"hi"))
    [(1, 150), (2, b'hi')]
    """
    position = 0

    def varint() -> int:
        nonlocal position
        value, shift = 0, 0
        while True:
            byte = data[position]
            position += 1
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value
            shift += 7

    while position < len(data):
        number, kind = divmod(varint(), 8)
        if kind == 0:
            yield number, varint()
            continue
        sizes = {1: 8, 5: 4}
        size = varint() if kind == 2 else sizes[kind]
        if position + size > len(data):
            raise ValueError("the message is cut")
        yield number, data[position : position + size]
        position += size
