from __future__ import annotations

from pathlib import Path

import pytest
import torch

from hidream_grpc.devices.cpu import CpuDevice
from hidream_grpc.model.costs.activations import MAX_CACHED_PROMPTS
from hidream_grpc.model.parameters import PaddedPrompt
from hidream_grpc.model.pipeline import HiDreamModel
from hidream_grpc.model.prompts.encoding import (
    EMPTY_PROMPT,
    ConditioningCache,
    EncodedPrompts,
)
from hidream_grpc.model.prompts.text_encoders import TextEncoders
from hidream_grpc.model.transformer.conditioning import Conditioning
from tests.support.checkpoints import MAX_TOKENS_OF_T5
from tests.support.denoising import parameters


@pytest.fixture
def model(tiny_checkpoint: Path) -> HiDreamModel:
    return HiDreamModel.from_pretrained(tiny_checkpoint, None, CpuDevice())


CIRCLE, STAR, BROKEN = (PaddedPrompt(text) for text in ("a red circle", "a star", "broken"))


def prompt(number: int) -> PaddedPrompt:
    return PaddedPrompt(f"prompt {number}")


def conditioning(number: int = 0) -> Conditioning:
    return Conditioning(torch.tensor([number]), torch.empty(0), torch.empty(0))


def test_the_oldest_prompt_goes_when_there_are_too_many() -> None:
    cache = ConditioningCache()
    for number in range(MAX_CACHED_PROMPTS + 2):
        cache.keep(prompt(number), conditioning(number))
    kept = [number for number in range(MAX_CACHED_PROMPTS + 2) if prompt(number) in cache]
    assert kept == list(range(2, MAX_CACHED_PROMPTS + 2))
    assert all(cache[prompt(number)].pooled.item() == number for number in kept)


def test_a_prompt_that_is_used_again_is_the_latest() -> None:
    cache = ConditioningCache()
    for number in range(MAX_CACHED_PROMPTS):
        cache.keep(prompt(number), conditioning())
    cache.keep(prompt(0), conditioning())
    cache.keep(PaddedPrompt("one more"), conditioning())
    assert prompt(0) in cache
    assert prompt(1) not in cache


def test_the_empty_prompt_stays_and_takes_no_room() -> None:
    cache = ConditioningCache()
    assert EMPTY_PROMPT not in cache
    cache.keep(EMPTY_PROMPT, conditioning(7))
    for number in range(MAX_CACHED_PROMPTS):
        cache.keep(prompt(number), conditioning())
    assert cache[EMPTY_PROMPT].pooled.item() == 7
    assert prompt(0) in cache


def test_a_prompt_of_another_length_is_another_prompt_the_empty_one_too(model: HiDreamModel) -> None:
    prompts = [PaddedPrompt(text, num_tokens) for text in ("", "a star") for num_tokens in (128, 192)]
    encoded = model.encode(prompts)
    assert (encoded.num_cache_hits, encoded.num_cache_misses) == (0, 2)
    # This checkpoint's T5 takes no more than 64 tokens.
    lengths = [encoded.conditionings[prompt].num_tokens for prompt in prompts]
    assert lengths == [(MAX_TOKENS_OF_T5, 128), (MAX_TOKENS_OF_T5, 192)] * 2
    again = model.encode(prompts)
    assert (again.num_cache_hits, again.num_cache_misses) == (2, 0)
    assert all(again.conditionings[prompt] is encoded.conditionings[prompt] for prompt in prompts)


def test_prompts_are_counted_but_for_the_empty_one(model: HiDreamModel) -> None:
    first = model.encode([CIRCLE, EMPTY_PROMPT, CIRCLE, STAR])
    assert (first.num_cache_hits, first.num_cache_misses) == (1, 2)
    second = model.encode([STAR, EMPTY_PROMPT])
    assert (second.num_cache_hits, second.num_cache_misses) == (1, 0)
    assert second.conditionings[STAR] is first.conditionings[STAR]


def test_more_prompts_at_once_than_are_cached_are_all_encoded(model: HiDreamModel) -> None:
    before = PaddedPrompt("here before")
    model.encode([before])
    prompts = [prompt(number) for number in range(MAX_CACHED_PROMPTS + 3)] + [before]
    encoded = model.encode(prompts)
    assert (encoded.num_cache_hits, encoded.num_cache_misses) == (1, MAX_CACHED_PROMPTS + 3)
    assert encoded.has_all_of(prompts)
    for each in prompts:
        state = model.begin(parameters(each.text, guidance_scale=0.0), encoded)
        assert state.conditioning is encoded.conditionings[each]


def test_a_prompt_that_fails_does_not_keep_others_from_being_encoded(
    model: HiDreamModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode = TextEncoders.encode

    def fail_once(self: TextEncoders, prompt: PaddedPrompt) -> object:
        if prompt == BROKEN:
            raise RuntimeError("no room for this prompt")
        return encode(self, prompt)

    with monkeypatch.context() as patch:
        patch.setattr(TextEncoders, "encode", fail_once)
        encoded = model.encode([BROKEN, STAR])
        with pytest.raises(RuntimeError, match="no room"):
            model.begin(parameters("broken", guidance_scale=0.0))
    assert encoded.has_all_of([STAR])
    with pytest.raises(RuntimeError, match="no room"):
        encoded.has_all_of([STAR, BROKEN])
    with pytest.raises(RuntimeError, match="no room"):
        encoded.require([BROKEN])
    # A prompt that failed is not cached.
    assert model.encode([BROKEN]).num_cache_misses == 1


def test_what_failed_on_another_rank_is_missing_without_an_error_here() -> None:
    elsewhere = PaddedPrompt("failed elsewhere")
    encoded = EncodedPrompts({STAR: conditioning()}, {}, 0, 2)
    assert not encoded.has_all_of([STAR, elsewhere])
    with pytest.raises(LookupError):
        encoded.require([elsewhere])
