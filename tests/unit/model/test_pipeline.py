from __future__ import annotations

import io
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from hidream_grpc.devices.base import open_device
from hidream_grpc.model import text_encoders
from hidream_grpc.model.demo import demo_checkpoint_path
from hidream_grpc.model.pipeline import HiDreamModel
from tests.denoising import denoise, parameters, take_step


@pytest.fixture(scope="module")
def model(tiny_checkpoint: Path) -> HiDreamModel:
    return HiDreamModel.from_pretrained(tiny_checkpoint, None, open_device("cpu", 0))


@pytest.fixture
def encoder_runs(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Prompts that the text encoders really ran for."""
    prompts: list[str] = []
    encode = text_encoders.TextEncoders._encode

    def recording(self: text_encoders.TextEncoders, prompt: str) -> text_encoders.PromptEmbeds:
        prompts.append(prompt)
        return encode(self, prompt)

    monkeypatch.setattr(text_encoders.TextEncoders, "_encode", recording)
    yield prompts


def test_a_model_says_what_it_is(model: HiDreamModel) -> None:
    assert model.scheduler_name == "UniPCMultistepScheduler"
    assert model.shift == 3.0
    assert model.num_parameters > 400_000


def test_a_llama_folder_of_its_own_gives_the_same_picture(
    model: HiDreamModel, split_checkpoint: tuple[Path, Path]
) -> None:
    split = HiDreamModel.from_pretrained(*split_checkpoint, open_device("cpu", 0))
    assert split.num_parameters == model.num_parameters
    assert torch.equal(denoise(split, parameters()).latents, denoise(model, parameters()).latents)


def test_a_prompt_is_encoded_once_while_it_is_among_the_latest(
    model: HiDreamModel, encoder_runs: list[str]
) -> None:
    model.begin(parameters("first"))
    for index in range(text_encoders.MAX_CACHED_PROMPTS - 1):
        model.begin(parameters(f"prompt {index}"))
    model.begin(parameters("first"))
    assert encoder_runs.count("first") == 1
    model.begin(parameters("one more"))
    model.begin(parameters("prompt 0"))
    assert encoder_runs.count("prompt 0") == 2
    assert encoder_runs.count("first") == 1


def test_the_empty_negative_prompt_never_costs_an_encoder_run(
    model: HiDreamModel, encoder_runs: list[str]
) -> None:
    for index in range(text_encoders.MAX_CACHED_PROMPTS + 2):
        model.begin(parameters(f"unlike any other {index}"))
    assert "" not in encoder_runs


def test_a_request_without_guidance_never_encodes_its_negative_prompt(
    model: HiDreamModel, encoder_runs: list[str]
) -> None:
    state = model.begin(parameters("only me", negative_prompt="not me", guidance_scale=0.0))
    assert encoder_runs == ["only me"]
    assert model.collect([state]).num_samples == 1


def test_equal_timesteps_of_a_long_schedule_do_not_skip_a_step(model: HiDreamModel) -> None:
    # UniPC rounds timesteps to integers: with so many steps the first two are the same.
    state = model.begin(parameters(num_inference_steps=600, guidance_scale=0.0))
    timesteps = state.scheduler.timesteps
    assert timesteps[0] == timesteps[1]
    take_step(model, [state])
    assert state.scheduler.step_index == state.step == 1


def test_a_request_of_a_thousand_steps_ends(model: HiDreamModel) -> None:
    state = model.begin(parameters(num_inference_steps=1000, guidance_scale=0.0))
    batch = model.collect([state])
    noise = torch.zeros_like(batch.latents)
    while not state.is_denoised:
        model.advance([state], batch, noise)
    assert state.latents.isfinite().all()


def test_no_rows_give_no_prediction_and_no_error(model: HiDreamModel) -> None:
    batch = model.collect([model.begin(parameters())])
    for rows in (range(0), range(2, 2), range(1, 1)):
        prediction = model.predict(batch, rows)
        assert prediction.shape == (0, *batch.sample_shape)
        assert prediction.dtype == batch.dtype


def test_a_prediction_of_another_batch_is_refused(model: HiDreamModel) -> None:
    state = model.begin(parameters())
    batch = model.collect([state])
    with pytest.raises(ValueError, match=r"\(1, 16, 8, 8\) for \(2, 16, 8, 8\) latents"):
        model.advance([state], batch, model.predict(batch, range(1)))
    assert state.step == 0


def test_predictions_gathered_outside_of_inference_mode_can_be_used(model: HiDreamModel) -> None:
    # A rank copies its rows into a buffer that the collective fills.
    state = model.begin(parameters())
    batch = model.collect([state])
    gathered = torch.empty(batch.num_samples, *batch.sample_shape, dtype=batch.dtype)
    for rows in (range(1), range(1, 2)):
        gathered[rows.start : rows.stop].copy_(model.predict(batch, rows))
    model.advance([state], batch, gathered)
    assert state.step == 1


def test_a_preview_is_a_small_jpeg_of_the_pictures_shape(model: HiDreamModel) -> None:
    with Image.open(io.BytesIO(model.preview(model.begin(parameters(width=128, height=64))))) as preview:
        assert preview.format == "JPEG"
        assert preview.size == (64, 32)


def test_the_demo_model_draws_the_size_asked_for() -> None:
    demo = HiDreamModel.from_pretrained(demo_checkpoint_path(), None, open_device("cpu", 0))
    request = parameters("a red circle on a blue background", width=128, height=128, num_inference_steps=2)
    pixels = demo.decode(denoise(demo, request), 0)
    assert pixels.shape == (128, 128, 3)
    assert pixels.dtype == np.uint8


def test_loading_and_drawing_write_nothing_to_the_terminal(tiny_checkpoint: Path) -> None:
    program = (
        "import sys; from pathlib import Path\n"
        "from hidream_grpc.devices.base import open_device\n"
        "from hidream_grpc.model.pipeline import HiDreamModel\n"
        "from tests.denoising import denoise, parameters\n"
        "model = HiDreamModel.from_pretrained(Path(sys.argv[1]), None, open_device('cpu', 0))\n"
        "state = denoise(model, parameters('word ' * 300))\n"
        "model.decode(state, 0), model.preview(state)\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program, str(tiny_checkpoint)],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    assert (done.stdout, done.stderr) == ("", "")


def test_what_the_server_imports_of_the_model_is_free_of_torch() -> None:
    modules = ["checkpoint", "demo", "images", "parameters", "prompt_tokens", "sizes", "variants"]
    program = f"import sys, {', '.join(f'hidream_grpc.model.{module}' for module in modules)}\n"
    program += "print([name for name in ('torch', 'diffusers', 'transformers') if name in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout == "[]\n"
