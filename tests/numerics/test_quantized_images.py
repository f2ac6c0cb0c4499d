"""Images of quantized weights are those of exact ones, as good as nobody sees the difference."""

from __future__ import annotations

import pytest

from hidream_grpc.devices.cpu import CpuDevice
from hidream_grpc.model.checkpoint.demo import demo_checkpoint_path
from hidream_grpc.model.checkpoint.description import describe_checkpoint
from hidream_grpc.model.weight_format import WeightFormat
from scripts.bench.weights import compare, images_of, load
from scripts.demo_model.evaluate import unseen_captions

SIDE_PIXELS = 128
NUM_CAPTIONS = 50
MIN_MEDIAN_PSNR = 35.0
MAX_POINTS_LOST = 2.0


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_images_of_the_demo_model_are_near_those_of_its_exact_weights_and_show_the_same() -> None:
    checkpoint = describe_checkpoint(demo_checkpoint_path(), None)
    captions = unseen_captions(NUM_CAPTIONS, seed=0)
    images = {
        weights: images_of(load(weights, CpuDevice()), checkpoint, captions, SIDE_PIXELS)
        for weights in WeightFormat
    }
    for weights in (WeightFormat.INT8, WeightFormat.FLOAT8):
        likeness = compare(images[weights], images[WeightFormat.BFLOAT16], captions)
        assert MIN_MEDIAN_PSNR <= likeness.median_psnr < 100.0, weights
        assert likeness.judged_right >= likeness.judged_right_exact - MAX_POINTS_LOST, weights
