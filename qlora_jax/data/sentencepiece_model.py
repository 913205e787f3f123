"""The `tokenizers` pipeline of a SentencePiece unigram model (`spiece.model`), which T5 and mT5
bring where they have no `tokenizer.json`: the one that transformers makes of such a file.
"""

import pathlib

import tokenizers
from google.protobuf.message import DecodeError
from sentencepiece import sentencepiece_model_pb2
from tokenizers import decoders, normalizers, pre_tokenizers

from qlora_jax.errors import WeightsError
from qlora_jax.guarded_files import read_guarded

_MAX_BYTES = 32 << 20  # mT5's has 4.3 MB
_Piece = sentencepiece_model_pb2.ModelProto.SentencePiece


def build_sentencepiece_tokenizer(path: pathlib.Path, extra_ids: int = 0) -> tokenizers.Tokenizer:
    """Builds the pipeline of a unigram model.

    Args:
      path: `spiece.model`.
      extra_ids: T5's sentinels `<extra_id_0>`, ..., which are not in the file; they come last, and
        the last of them first.

    Raises:
      WeightsError: the file is damaged, or no unigram model.
    """
    model = sentencepiece_model_pb2.ModelProto()
    try:
        model.ParseFromString(read_guarded(path, _MAX_BYTES))
    except OSError as error:
        raise WeightsError(f"{path} cannot be read: {error.strerror}") from None
    except DecodeError:
        raise WeightsError(f"{path} is no SentencePiece model. Download it again.") from None
    trainer = model.trainer_spec
    if not model.pieces or trainer.model_type != trainer.UNIGRAM:
        raise WeightsError(
            f"{path} is no unigram model of SentencePiece, the kind that T5 and mT5 have. Convert "
            "it in an environment with transformers: "
            "`AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)`."
        )
    kinds = [piece.type for piece in model.pieces]
    special = [p.piece for p in model.pieces if p.type in (_Piece.UNKNOWN, _Piece.CONTROL)]
    written = [p.piece for p in model.pieces if p.type == _Piece.USER_DEFINED]
    sentinels = [f"<extra_id_{i}>" for i in reversed(range(extra_ids))]
    backend = tokenizers.Tokenizer(
        tokenizers.models.Unigram(
            [(p.piece, p.score) for p in model.pieces] + [(text, 0.0) for text in sentinels],
            unk_id=kinds.index(_Piece.UNKNOWN) if _Piece.UNKNOWN in kinds else None,
            byte_fallback=trainer.byte_fallback,
        )
    )
    steps = [normalizers.Strip(left=False), normalizers.Replace(tokenizers.Regex(" {2,}"), "▁")]
    if charsmap := model.normalizer_spec.precompiled_charsmap:
        steps.insert(0, normalizers.Precompiled(charsmap))
    backend.normalizer = normalizers.Sequence(steps)
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    backend.add_special_tokens(special + sentinels)
    backend.add_tokens(written)
    return backend
