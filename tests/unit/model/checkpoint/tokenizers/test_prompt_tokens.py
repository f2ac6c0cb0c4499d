from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import CLIPTokenizer, PreTrainedTokenizerFast, T5Tokenizer

from hidream_grpc.model.checkpoint.demo import demo_checkpoint_path
from hidream_grpc.model.checkpoint.tokenizers.prompt_tokens import PromptTokenCounter, TokenCount

TOKENIZERS: dict[str, tuple[Any, str]] = {
    "CLIP-L": (CLIPTokenizer, "tokenizer"),
    "CLIP-G": (CLIPTokenizer, "tokenizer_2"),
    "T5": (T5Tokenizer, "tokenizer_3"),
    "Llama": (PreTrainedTokenizerFast, "tokenizer_4"),
}

PROMPTS = [
    "",
    " ",
    "a red circle on a blue background",
    "A RED  Circle,\n\ton a\u00a0blue background!?",
    "蓝色背景上的红色圆形",
    "it's they'll 3.14 👩‍👩‍👧‍👦 e\u0301 é ﬁ Ⅷ",
    "<|endoftext|> </s> <|begin_of_text|> <pad> <extra_id_0>",
    "x" * 500,
    "\x00\x1f\u200b\ufeff",
]


class Checkpoint:
    def __init__(self, folder: Path, extra_model_path: Path | None = None) -> None:
        self.counter = PromptTokenCounter.from_checkpoint(folder, extra_model_path)
        self.tokenizers: dict[str, Any] = {
            encoder: tokenizer_class.from_pretrained(
                extra_model_path if extra_model_path and name == "tokenizer_4" else folder / name
            )
            for encoder, (tokenizer_class, name) in TOKENIZERS.items()
        }

    def check(self, prompt: str) -> None:
        counts = {count.encoder: count.num_tokens for count in self.counter.count(prompt)}
        # verbose=False: transformers warns of every text over the tokenizer's own limit.
        assert counts == {
            encoder: len(tokenizer(prompt, verbose=False).input_ids)
            for encoder, tokenizer in self.tokenizers.items()
        }


@pytest.fixture(scope="session", params=["tiny", "split", "demo"])
def checkpoint(
    request: pytest.FixtureRequest, tiny_checkpoint: Path, split_checkpoint: tuple[Path, Path]
) -> Checkpoint:
    match request.param:
        case "tiny":
            return Checkpoint(tiny_checkpoint)
        case "split":
            return Checkpoint(*split_checkpoint)
    return Checkpoint(demo_checkpoint_path())


@pytest.mark.parametrize("prompt", PROMPTS, ids=repr)
def test_counts_are_those_of_the_encoders_own_tokenizers(prompt: str, checkpoint: Checkpoint) -> None:
    checkpoint.check(prompt)


@settings(max_examples=100, deadline=None)
@given(prompt=st.text(max_size=200))
def test_counts_agree_for_any_text(prompt: str, checkpoint: Checkpoint) -> None:
    checkpoint.check(prompt)


def test_each_encoder_counts_its_special_tokens(tiny_checkpoint: Path) -> None:
    counts = PromptTokenCounter.from_checkpoint(tiny_checkpoint, None).count("red red red")
    # One for each word, and one at the end of T5's, at each end of CLIP's.
    assert counts[:3] == (TokenCount("CLIP-L", 5), TokenCount("CLIP-G", 5), TokenCount("T5", 4))
