"""A server that takes longer prompts than the model was trained with."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from hidream_grpc.devices.device import open_device
from hidream_grpc.model.pipeline import HiDreamModel
from tests.e2e.test_bad_input import refused, violations_of
from tests.support.checkpoints import write_tiny_checkpoint, write_unlimited_t5
from tests.support.denoising import decode, denoise, parameters
from tests.support.live_server import running_server
from tests.support.streams import follow, request

# Llama has a token for each word and each space, and one at the start.
SPEC: dict[str, Any] = {"width": 64, "height": 64, "num_inference_steps": 4, "guidance_scale": 4.0, "seed": 7}
PROMPTS = {128: " ".join(["red"] * 60), 192: " ".join(["red"] * 90), 256: " ".join(["blue"] * 120)}


@pytest.mark.long
def test_long_prompts_are_drawn_whole_and_those_too_long_for_an_encoder_are_refused(tmp_path: Path) -> None:
    tiny = write_tiny_checkpoint(tmp_path / "tiny")
    folder = write_unlimited_t5(tiny, tmp_path / "HiDream-I1")
    model = HiDreamModel.from_pretrained(folder, None, open_device("cpu", 0))
    with (
        running_server("--model-path", str(folder), "--max-prompt-tokens", "256") as server,
        server.stub() as stub,
    ):
        info = server.info()
        assert info.model.trained_prompt_tokens == 128
        limits = {"CLIP-L": 218, "CLIP-G": 218, "T5": 256, "Llama": 256}
        assert dict(info.limits.max_prompt_tokens_by_encoder) == limits
        assert info.limits.max_prompt_tokens == 218

        # All three at once, with the shortest as the negative prompt of the longest.
        negative: dict[int, dict[str, Any]] = {128: {}, 192: {}, 256: {"negative_prompt": PROMPTS[128]}}
        calls = {
            prompt_tokens: stub.Generate(request(prompt, **SPEC, **negative[prompt_tokens]))
            for prompt_tokens, prompt in PROMPTS.items()
        }
        for prompt_tokens, call in calls.items():
            (image,) = follow(call).images
            with Image.open(io.BytesIO(image)) as drawn:
                pixels = np.asarray(drawn).astype(int)
            for other in PROMPTS:
                same = parameters(
                    prompt_tokens=other, prompt=PROMPTS[prompt_tokens], **negative[prompt_tokens]
                )
                difference = np.abs(decode(model, denoise(model, same), 0) - pixels).max()
                assert (difference <= 1) == (other == prompt_tokens)

        for prompt, told in {
            "x" * 220: "218 tokens of CLIP-L, is 222",
            "red " * 140: "256 tokens of Llama",
        }.items():
            error = refused(stub.Generate(request(prompt, **SPEC)))
            assert told in violations_of(error)["spec.prompt"]
