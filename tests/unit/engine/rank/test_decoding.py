from __future__ import annotations

import threading

import pytest
import torch
from diffusers import AutoencoderKL

from hidream_grpc.devices.device import open_device
from hidream_grpc.engine.protocol.messages import Admission, DecodedImage
from hidream_grpc.engine.rank.decoding import RunningDecode
from hidream_grpc.model.decoding.images import encode_image
from hidream_grpc.model.decoding.vae import ImageDecoding
from hidream_grpc.model.image_metadata import ImageMetadata
from tests.support.autoencoders import latents_of, small_vae
from tests.support.denoising import parameters

SIZE = (8, 8)


class HeldFile:
    """Encodes a file once it is allowed to."""

    def __init__(self) -> None:
        self.may_end = threading.Event()

    def __call__(self, *_arguments: object, **_options: object) -> bytes:
        self.may_end.wait()
        return b"file"


class OneSecondSlices(ImageDecoding):
    """A decoder with its own clock, by which a slice takes one second and all else no time."""

    now_seconds = 0.0

    def advance(self) -> None:
        super().advance()
        self.now_seconds += 1.0

    def clock(self) -> float:
        return self.now_seconds


@pytest.fixture(scope="module")
def vae() -> AutoencoderKL:
    return small_vae()


@pytest.fixture
def slices(vae: AutoencoderKL) -> OneSecondSlices:
    return OneSecondSlices(vae, latents_of(vae, SIZE))


def running(slices: OneSecondSlices) -> RunningDecode:
    admission = Admission(claim_id="job/1", log_fields={}, parameters=parameters())
    return RunningDecode(admission, 3, slices, open_device("cpu", 0), ImageMetadata(), slices.clock)


def expected_file(vae: AutoencoderKL) -> bytes:
    decoding = ImageDecoding(vae, latents_of(vae, SIZE))
    while not decoding.is_finished:
        decoding.advance()
    return encode_image(decoding.pixels(), parameters().output_format, parameters().quality)


@pytest.mark.parametrize(
    ("budget_seconds", "num_slices"),
    [
        pytest.param(0.0, 1, id="none"),
        pytest.param(0.5, 1, id="less than a slice"),
        pytest.param(1.0, 1, id="one slice"),
        pytest.param(3.5, 4, id="three and a half"),
    ],
)
def test_a_piece_exceeds_its_budget_by_one_slice_at_most_and_always_gets_on(
    slices: OneSecondSlices, budget_seconds: float, num_slices: int
) -> None:
    decode = running(slices)
    taken = []
    for _ in range(3):
        before = slices.now_seconds
        assert decode.advance(budget_seconds, waits_for_file=False) is None
        taken.append(slices.now_seconds - before)
    assert taken == [num_slices] * 3


def test_pieces_give_the_image_that_one_piece_gives(vae: AutoencoderKL, slices: OneSecondSlices) -> None:
    whole = running(slices).advance(None, waits_for_file=False)
    in_pieces = OneSecondSlices(vae, latents_of(vae, SIZE))
    decode = running(in_pieces)
    while (image := decode.advance(2.0, waits_for_file=True)) is None:
        pass
    assert image == whole
    assert image == DecodedImage(
        claim_id="job/1", image_index=3, data=expected_file(vae), decode_seconds=in_pieces.now_seconds
    )


def test_a_round_with_steps_does_not_wait_for_the_file(
    slices: OneSecondSlices, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hidream_grpc.engine.rank.decoding.encode_image", held := HeldFile())
    decode = running(slices)
    try:
        while not slices.is_finished:
            assert decode.advance(1.0, waits_for_file=False) is None
        for _ in range(3):
            assert decode.advance(1.0, waits_for_file=False) is None
    finally:
        held.may_end.set()
    while (image := decode.advance(1.0, waits_for_file=True)) is None:
        pass
    assert image.data == b"file"


def test_a_decoder_that_fails_says_so_and_so_does_a_file_that_cannot_be_written(
    vae: AutoencoderKL, slices: OneSecondSlices, monkeypatch: pytest.MonkeyPatch
) -> None:
    too_few_channels = OneSecondSlices(vae, torch.zeros(1, 15, *SIZE))
    with pytest.raises(RuntimeError, match="15 channels"):
        running(too_few_channels).advance(None, waits_for_file=False)

    def refuse(*_arguments: object, **_options: object) -> bytes:
        raise OSError("no such format")

    monkeypatch.setattr("hidream_grpc.engine.rank.decoding.encode_image", refuse)
    with pytest.raises(OSError, match="no such format"):
        running(slices).advance(None, waits_for_file=False)
