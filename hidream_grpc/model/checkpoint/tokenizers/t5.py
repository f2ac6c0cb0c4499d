"""Makes T5's tokenizer from the file of SentencePiece, where a checkpoint holds no other."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import msgspec
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, processors

from hidream_grpc.errors import ModelNotFoundError
from hidream_grpc.model.checkpoint.files import read_json

_PAD, _END, _UNKNOWN = range(3)


class _AddedToken(msgspec.Struct, frozen=True):
    content: str
    lstrip: bool = False
    rstrip: bool = False
    normalized: bool = False
    single_word: bool = False


class _T5TokenizerConfig(msgspec.Struct, frozen=True):
    extra_ids: Annotated[int, msgspec.Meta(ge=0, le=10_000)] = 100
    added_tokens_decoder: dict[int, _AddedToken] = {}


def t5_tokenizer(folder: Path, flag: str) -> Tokenizer:
    """Convert spiece.model into the tokenizer of the ranks, with the same tokens for any prompt.

    Raises:
        ModelNotFoundError: the file is no model of SentencePiece.

    Source: transformers 5.24 tokenization_t5.py, convert_slow_tokenizer.py (T5Converter).
    """
    # Imported here, since few checkpoints have no tokenizer.json and other servers need not wait for it.
    from sentencepiece import sentencepiece_model_pb2

    path = folder / "spiece.model"
    # The module makes its classes when it is imported.
    model = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]
    try:
        model.ParseFromString(path.read_bytes())
        pieces = [(piece.piece, piece.score) for piece in model.pieces]
    except Exception as error:  # protobuf's own, without a common type
        raise ModelNotFoundError(flag, path, f"is no SentencePiece model: {error}") from None
    if len(pieces) <= _UNKNOWN:
        raise ModelNotFoundError(flag, path, "is no SentencePiece model: it holds no pieces of words")
    end = pieces[_END][0]
    settings = folder / "tokenizer_config.json"
    config = read_json(settings, _T5TokenizerConfig, flag) if settings.is_file() else _T5TokenizerConfig()
    sentinels = [f"<extra_id_{number}>" for number in reversed(range(config.extra_ids))]

    vocabulary = pieces + [(token, 0.0) for token in sentinels]
    tokenizer = Tokenizer(models.Unigram(vocabulary, unk_id=_UNKNOWN, byte_fallback=False))
    if charsmap := model.normalizer_spec.precompiled_charsmap:
        tokenizer.normalizer = normalizers.Precompiled(charsmap)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.WhitespaceSplit(),
            pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always", split=True),
        ]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single=["$A", end], pair=["$A", end, "$B", end], special_tokens=[(end, _END)]
    )
    own = {token.content: token for token in config.added_tokens_decoder.values()}
    special = [*(pieces[index][0] for index in (_PAD, _END, _UNKNOWN)), *sentinels]
    tokenizer.add_special_tokens(
        [
            AddedToken(
                name,
                lstrip=token.lstrip,
                rstrip=token.rstrip,
                normalized=token.normalized,
                single_word=token.single_word,
                special=True,
            )
            for name in special
            if (token := own.get(name, _AddedToken(name)))
        ]
    )
    return tokenizer
