from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModelWithProjection, LlamaModel, T5EncoderModel

from hidream_grpc.devices.cpu import CpuDevice
from hidream_grpc.devices.device_types import DeviceMemory
from hidream_grpc.model.checkpoint.text_encoders import TextEncoderName, text_encoder_files
from hidream_grpc.model.parallel.groups import Axis
from hidream_grpc.model.parameters import PaddedPrompt
from hidream_grpc.model.prompts.text_encoders import PromptEmbeds, TextEncoders
from tests.support.checkpoints import LLAMA_LAYERS_READ

GIB = 1024**3
RESERVE_BYTES = 4 * GIB


class Accelerator(CpuDevice):
    """A stand-in for an accelerator, which computes in bfloat16 and has memory of its own."""

    backend = "nccl"
    dtype = torch.bfloat16

    def __init__(self, free_bytes: int) -> None:
        super().__init__()
        self.free_bytes = free_bytes

    def memory(self) -> DeviceMemory:
        return DeviceMemory(total_bytes=16 * GIB, free_bytes=self.free_bytes)


def load(checkpoint: Path, device: CpuDevice, world: Axis | None = None) -> TextEncoders:
    return TextEncoders.from_pretrained(
        checkpoint, None, LLAMA_LAYERS_READ, device, world or Axis("world"), reserve_bytes=RESERVE_BYTES
    )


CIRCLE = PaddedPrompt("a red circle")


def encode(encoders: TextEncoders, prompt: PaddedPrompt) -> PromptEmbeds:
    return PromptEmbeds.from_outputs(encoders.encode(prompt))


def test_what_the_files_say_of_the_encoders_is_what_they_are(tiny_checkpoint: Path) -> None:
    files = text_encoder_files(tiny_checkpoint, None, len(LLAMA_LAYERS_READ))
    outputs = load(tiny_checkpoint, CpuDevice()).encode(CIRCLE)
    assert {name: tuple(output.shape) for name, output in outputs.items()} == {
        name: f.output_shape(CIRCLE.num_tokens) for name, f in files.items()
    }
    classes = {
        TextEncoderName.CLIP_L: CLIPTextModelWithProjection,
        TextEncoderName.CLIP_G: CLIPTextModelWithProjection,
        TextEncoderName.T5: T5EncoderModel,
        TextEncoderName.LLAMA: LlamaModel,
    }
    for name, f in files.items():
        model = classes[name].from_pretrained(f.folder)  # type: ignore[attr-defined]
        assert f.num_parameters == model.num_parameters()


def test_a_clips_old_constants_are_no_parameters(own_checkpoint: Path) -> None:
    before = text_encoder_files(own_checkpoint, None, 2)[TextEncoderName.CLIP_L]
    path = before.folder / "model.safetensors"
    tensors = load_file(path) | {"text_model.embeddings.position_ids": torch.arange(128)[None]}
    save_file(tensors, path, metadata={"format": "pt"})
    assert text_encoder_files(own_checkpoint, None, 2)[TextEncoderName.CLIP_L] == before


def test_each_rank_runs_its_own_encoders_and_makes_room_for_the_others(tiny_checkpoint: Path) -> None:
    whole = load(tiny_checkpoint, CpuDevice())
    expected = whole.encode(CIRCLE)
    ranks = [load(tiny_checkpoint, CpuDevice(), Axis("world", range(3), rank)) for rank in range(3)]
    assert {rank.num_parameters for rank in ranks} == {whole.num_parameters}
    assert ranks[0].owners == ranks[1].owners == ranks[2].owners
    assert set(ranks[0].owners.values()) == {0, 1, 2}
    for rank, encoders in enumerate(ranks):
        for name, output in encoders.encode(CIRCLE).items():
            assert output.shape == expected[name].shape
            assert output.dtype == expected[name].dtype
            if encoders.owners[name] == rank:
                assert torch.equal(output, expected[name])


@pytest.mark.parametrize(
    ("free_bytes", "where", "is_exact"),
    [(16 * GIB, "on the device", False), (4 * GIB, "on the host's CPU in torch.float32", True)],
    ids=["room", "no room"],
)
def test_encoders_go_onto_the_device_where_it_has_room_and_else_onto_its_host(
    tiny_checkpoint: Path, caplog: pytest.LogCaptureFixture, free_bytes: int, where: str, is_exact: bool
) -> None:
    with caplog.at_level(logging.INFO, "hidream_grpc"):
        encoders = load(tiny_checkpoint, Accelerator(free_bytes))
    (line,) = (r.getMessage() for r in caplog.records if r.name == "hidream_grpc.model.prompts.text_encoders")
    assert line.count(where) == 4
    embeds = encode(encoders, CIRCLE)
    exact = encode(load(tiny_checkpoint, CpuDevice()), CIRCLE)
    assert embeds.llama.dtype == embeds.t5.dtype == embeds.pooled.dtype == torch.bfloat16
    # The host computes in float32 and rounds once, the device in every operation.
    assert torch.equal(embeds.llama, exact.llama.bfloat16()) is is_exact


def test_the_largest_encoder_gets_the_room_that_there_is(
    tiny_checkpoint: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Filling(Accelerator):
        """An accelerator with room for one encoder."""

        def memory(self) -> DeviceMemory:
            memory = super().memory()
            self.free_bytes = 4 * GIB
            return memory

    with caplog.at_level(logging.INFO, "hidream_grpc"):
        load(tiny_checkpoint, Filling(5 * GIB))
    (line,) = (r.getMessage() for r in caplog.records if r.name == "hidream_grpc.model.prompts.text_encoders")
    sizes = {name: f.num_parameters for name, f in text_encoder_files(tiny_checkpoint, None, 2).items()}
    first, *others = line.removeprefix("text encoders of this rank: ").split("; ")
    assert first.startswith(f"{max(sizes, key=sizes.__getitem__)} on the device")
    assert all("on the host's CPU" in other for other in others)


def test_a_rank_without_an_encoder_says_so(tiny_checkpoint: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "hidream_grpc"):
        load(tiny_checkpoint, CpuDevice(), Axis("world", range(5), 4))
    assert "text encoders of this rank: none" in caplog.messages
