"""A checkpoint that holds T5's tokenizer as SentencePiece wrote it counts the tokens that its ranks get."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import sentencepiece
import torch
from safetensors.torch import load_file, save_file
from transformers import T5Tokenizer

from hidream_grpc.errors import ModelNotFoundError
from hidream_grpc.model.checkpoint.description import describe_checkpoint
from hidream_grpc.model.checkpoint.tokenizers.prompt_tokens import PromptTokenCounter
from hidream_grpc.model.checkpoint.tokenizers.t5 import t5_tokenizer
from hidream_grpc.model.loading import load_tokenizer

FLAG = "-m/--model-path"
SENTENCES = [
    "red circle on a blue background",
    "a yellow star",
    "绿色方块 红色圆形在蓝色背景上",
    "Ünïcode ﬁne",
]
PROMPTS = [
    "a red circle on a blue background",
    "",
    "  two   spaces\tand a\nline ",
    "红色圆形 ｆｕｌｌ ﬁne Ünïcode",
    "😀 ▁under_score <extra_id_5> star <extra_id_99>  and <extra_id_100>",
    "x</s>y <pad> <unk>z",
]


@pytest.fixture(scope="module")
def spiece_model() -> bytes:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES * 20),
        model_writer=model,
        vocab_size=100,
        hard_vocab_limit=False,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
    )
    return model.getvalue()


@pytest.mark.parametrize("config", ["none", "the library's", "fewer sentinels"])
def test_the_converted_tokenizer_gives_the_tokens_of_the_ranks(
    config: str, spiece_model: bytes, tmp_path: Path
) -> None:
    (tmp_path / "spiece.model").write_bytes(spiece_model)
    if config == "the library's":
        T5Tokenizer.from_pretrained(tmp_path).save_pretrained(tmp_path)
        (tmp_path / "tokenizer.json").unlink()
    elif config == "fewer sentinels":
        (tmp_path / "tokenizer_config.json").write_text(
            '{"extra_ids": 6, "added_tokens_decoder":'
            ' {"1": {"content": "</s>", "lstrip": true, "rstrip": true, "special": true}}}'
        )
    of_the_ranks = load_tokenizer(T5Tokenizer, tmp_path)
    converted = t5_tokenizer(tmp_path, FLAG)
    for prompt in PROMPTS:
        assert converted.encode(prompt).ids == of_the_ranks(prompt).input_ids, prompt


def with_larger_vocabulary(encoder: Path, vocab_size: int) -> None:
    config, weights = encoder / "config.json", encoder / "model.safetensors"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"vocab_size": vocab_size}))
    tensors = load_file(weights)
    tensors["shared.weight"] = torch.ones(vocab_size, tensors["shared.weight"].shape[1])
    save_file(tensors, weights, metadata={"format": "pt"})


def test_a_checkpoint_with_spiece_model_alone_is_accepted(spiece_model: bytes, own_checkpoint: Path) -> None:
    folder = own_checkpoint / "tokenizer_3"
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").unlink()
    (folder / "spiece.model").write_bytes(spiece_model)
    with pytest.raises(ModelNotFoundError, match="gives token ids up to "):
        PromptTokenCounter.from_checkpoint(own_checkpoint, None)
    with_larger_vocabulary(own_checkpoint / "text_encoder_3", vocab_size=250)
    describe_checkpoint(own_checkpoint, None)
    counts = PromptTokenCounter.from_checkpoint(own_checkpoint, None).count(PROMPTS[0])
    (t5,) = (count for count in counts if count.encoder == "T5")
    assert t5.num_tokens == len(load_tokenizer(T5Tokenizer, folder)(PROMPTS[0]).input_ids)


@pytest.mark.parametrize(
    "content", [b"no model at all", b"", b"\n\x03\n\x01a"], ids=["text", "empty", "a piece"]
)
def test_a_spiece_model_that_is_none_is_one_line_that_names_it(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "spiece.model").write_bytes(content)
    with pytest.raises(ModelNotFoundError, match="is no SentencePiece model") as raised:
        t5_tokenizer(tmp_path, FLAG)
    assert str(raised.value).startswith(f"{FLAG}: {tmp_path / 'spiece.model'}: ")
    assert "index" not in str(raised.value)
    assert "\n" not in str(raised.value)
