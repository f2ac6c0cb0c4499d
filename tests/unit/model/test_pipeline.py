from __future__ import annotations

import io
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import HiDreamImagePipeline
from PIL import Image

from hidream_grpc.devices.device import open_device
from hidream_grpc.errors import CheckpointChangedError, ModelNotFoundError
from hidream_grpc.model.checkpoint.demo import demo_checkpoint_path
from hidream_grpc.model.checkpoint.fingerprint import fingerprint_of
from hidream_grpc.model.checkpoint.text_encoders import TextEncoderName
from hidream_grpc.model.costs.activations import MAX_CACHED_PROMPTS
from hidream_grpc.model.denoising.state import StepBatch
from hidream_grpc.model.parallel.groups import ParallelGroups
from hidream_grpc.model.parallel.layout import Layout
from hidream_grpc.model.parameters import PaddedPrompt
from hidream_grpc.model.pipeline import HiDreamModel
from hidream_grpc.model.prompts.encoding import EMPTY_PROMPT
from hidream_grpc.model.prompts.text_encoders import TextEncoders
from tests.support.checkpoints import write_spoilt
from tests.support.denoising import decode, denoise, is_denoised, parameters, take_step


@pytest.fixture(scope="module")
def model(tiny_checkpoint: Path) -> HiDreamModel:
    model = HiDreamModel.from_pretrained(tiny_checkpoint, None, open_device("cpu", 0))
    # A rank does this when it has joined its group.
    model.encode([EMPTY_PROMPT])
    return model


@pytest.fixture
def encoder_runs(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The prompts for which the text encoders ran."""
    prompts: list[str] = []
    encode = TextEncoders.encode

    def recording(self: TextEncoders, prompt: PaddedPrompt) -> dict[TextEncoderName, torch.Tensor]:
        prompts.append(prompt.text)
        return encode(self, prompt)

    monkeypatch.setattr(TextEncoders, "encode", recording)
    yield prompts


def test_a_model_says_what_it_is(model: HiDreamModel) -> None:
    assert model.scheduler_name == "UniPCMultistepScheduler"
    assert model.shift == 3.0


def test_all_parameters_are_counted_though_ranks_hold_parts(
    model: HiDreamModel, tiny_checkpoint: Path
) -> None:
    pipeline = HiDreamImagePipeline.from_pretrained(tiny_checkpoint, local_files_only=True)
    components = ("text_encoder", "text_encoder_2", "text_encoder_3", "transformer", "vae")
    expected = sum(getattr(pipeline, name).num_parameters() for name in components)
    # Without the head that turns states into words.
    expected += pipeline.text_encoder_4.model.num_parameters()
    assert model.num_parameters == expected
    second = ParallelGroups(Layout(tensor_parallel=2), rank=1)
    share = HiDreamModel.from_pretrained(tiny_checkpoint, None, open_device("cpu", 0), second)
    assert share.num_parameters == expected


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
    for index in range(MAX_CACHED_PROMPTS - 1):
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
    for index in range(MAX_CACHED_PROMPTS + 2):
        model.begin(parameters(f"unlike any other {index}"))
    assert "" not in encoder_runs


def test_a_request_without_guidance_never_encodes_its_negative_prompt(
    model: HiDreamModel, encoder_runs: list[str]
) -> None:
    state = model.begin(parameters("only me", negative_prompt="not me", guidance_scale=0.0))
    assert encoder_runs == ["only me"]
    assert StepBatch.collect([state]).num_samples == 1


def test_equal_timesteps_of_a_long_schedule_do_not_skip_a_step(model: HiDreamModel) -> None:
    # UniPC rounds timesteps to integers: with so many steps the first two are the same.
    state = model.begin(parameters(num_inference_steps=600, guidance_scale=0.0))
    timesteps = state.scheduler.timesteps
    assert timesteps[0] == timesteps[1]
    take_step(model, [state])
    assert state.scheduler.step_index == state.step == 1


def test_a_request_of_a_thousand_steps_ends(model: HiDreamModel) -> None:
    state = model.begin(parameters(num_inference_steps=1000, guidance_scale=0.0))
    batch = StepBatch.collect([state])
    noise = torch.zeros_like(batch.latents)
    while not is_denoised(state):
        model.advance([state], batch, noise)
    assert state.latents.isfinite().all()


def test_a_prediction_of_another_batch_is_refused(model: HiDreamModel) -> None:
    state = model.begin(parameters())
    batch = StepBatch.collect([state])
    with pytest.raises(ValueError, match="1 rows for a batch of 2"):
        model.advance([state], batch, model.predict(batch)[:1])
    assert state.step == 0


def test_predictions_gathered_outside_of_inference_mode_can_be_used(model: HiDreamModel) -> None:
    # A rank copies its rows into a buffer that the collective fills.
    state = model.begin(parameters())
    batch = StepBatch.collect([state])
    gathered = torch.empty_like(batch.latents).copy_(model.predict(batch))
    model.advance([state], batch, gathered)
    assert state.step == 1


def test_a_preview_is_a_small_jpeg_of_the_images_shape(model: HiDreamModel) -> None:
    with Image.open(io.BytesIO(model.preview(model.begin(parameters(width=128, height=64))))) as preview:
        assert preview.format == "JPEG"
        assert preview.size == (64, 32)


def test_the_demo_model_draws_the_size_asked_for() -> None:
    demo = HiDreamModel.from_pretrained(demo_checkpoint_path(), None, open_device("cpu", 0))
    request = parameters("a red circle on a blue background", width=128, height=128, num_inference_steps=2)
    pixels = decode(demo, denoise(demo, request), 0)
    assert pixels.shape == (128, 128, 3)
    assert pixels.dtype == np.uint8


@pytest.mark.long
def test_loading_and_drawing_write_nothing_to_the_terminal(tiny_checkpoint: Path) -> None:
    program = (
        "import sys; from pathlib import Path\n"
        "from hidream_grpc.devices.device import open_device\n"
        "from hidream_grpc.model.pipeline import HiDreamModel\n"
        "from tests.support.denoising import decode, denoise, parameters\n"
        "model = HiDreamModel.from_pretrained(Path(sys.argv[1]), None, open_device('cpu', 0))\n"
        "state = denoise(model, parameters('word ' * 300))\n"
        "decode(model, state, 0), model.preview(state)\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program, str(tiny_checkpoint)],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    assert (done.stdout, done.stderr) == ("", "")


def test_a_loaded_model_has_its_weights_in_memory_and_not_in_its_files(own_checkpoint: Path) -> None:
    # With the dtype of the files, the libraries would keep a mapping of them.
    model = HiDreamModel.from_pretrained(own_checkpoint, None, open_device("cpu", 0))
    before = denoise(model, parameters()).latents
    assert str(own_checkpoint) not in Path("/proc/self/maps").read_text()
    for weights in own_checkpoint.rglob("*.safetensors"):
        with weights.open("r+b") as file:
            file.seek(weights.stat().st_size // 2)
            file.write(b"\1" * (weights.stat().st_size // 2))
    assert torch.equal(denoise(model, parameters()).latents, before)


def test_a_checkpoint_that_is_not_the_one_that_was_described_is_refused(own_checkpoint: Path) -> None:
    with pytest.raises(CheckpointChangedError, match=f"the checkpoint in {own_checkpoint} has changed"):
        HiDreamModel.from_pretrained(own_checkpoint, None, open_device("cpu", 0), fingerprint="0" * 16)


def test_a_checkpoint_that_is_exchanged_while_it_is_read_is_refused(
    own_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def exchange(*_arguments: object) -> None:
        (own_checkpoint / "scheduler" / "scheduler_config.json").write_text("{}")
        raise RuntimeError("size mismatch")

    fingerprint = fingerprint_of(own_checkpoint, None)
    monkeypatch.setattr("hidream_grpc.model.pipeline.load_share", exchange)
    with pytest.raises(CheckpointChangedError):
        HiDreamModel.from_pretrained(own_checkpoint, None, open_device("cpu", 0), fingerprint=fingerprint)


def test_a_checkpoint_whose_autoencoder_gives_no_numbers_is_refused_by_its_folder(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    def spoil(weights: dict[str, torch.Tensor]) -> None:
        weights["decoder.conv_out.bias"][:] = float("nan")

    folder = write_spoilt(tiny_checkpoint, tmp_path / "spoilt", {"vae": spoil})
    reason = f"-m/--model-path: {folder}/vae: the autoencoder gives numbers that are not finite"
    with pytest.raises(ModelNotFoundError, match=f"^{reason}$"):
        HiDreamModel.from_pretrained(folder, None, open_device("cpu", 0))
