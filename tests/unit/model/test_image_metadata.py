from __future__ import annotations

import json

from google.protobuf.json_format import ParseDict

from hidream.v1 import image_pb2, job_pb2
from hidream_grpc.model.image_metadata import ImageMetadata
from hidream_grpc.model.parameters import OutputFormat
from hidream_grpc.model.weight_format import WeightFormat, WeightFormats
from tests.support.denoising import parameters

METADATA = ImageMetadata(detail="full", model="demo", scheduler="FlowMatchEulerDiscreteScheduler", shift=3.0)


def test_the_document_is_the_request_that_gives_this_image_alone_in_the_words_of_the_contract() -> None:
    asked = parameters(
        prompt="a \x01 红 \U0001f98a",
        negative_prompt="blue",
        guidance_scale=3.5,
        num_images=4,
        seed=2**32 - 4,
        output_format=OutputFormat.WEBP,
        quality=70,
    )
    document = METADATA.document(asked, 3)
    assert document is not None
    spec = ParseDict(document["spec"], image_pb2.ImageSpec())
    assert spec == image_pb2.ImageSpec(
        prompt=asked.prompt,
        negative_prompt="blue",
        width=asked.width,
        height=asked.height,
        num_inference_steps=asked.num_inference_steps,
        guidance_scale=3.5,
        seed=2**32 - 1,
        output_format=image_pb2.OUTPUT_FORMAT_WEBP,
        quality=70,
    )
    execution = ParseDict(document["execution"], job_pb2.Execution())
    assert execution == job_pb2.Execution(model="demo", scheduler=METADATA.scheduler, shift=3.0)
    for is_ascii in (False, True):
        text = METADATA.text(asked, 3, is_ascii=is_ascii)
        assert text is not None
        assert text.isascii() is is_ascii
        assert "\x01" not in text
        assert json.loads(text) == document


def test_a_file_says_which_weights_were_quantized() -> None:
    weights = WeightFormats(transformer=WeightFormat.INT8)
    metadata = ImageMetadata(detail="full", model="demo", weights=weights)
    document, exact = metadata.document(parameters(), 0), METADATA.document(parameters(), 0)
    assert document is not None
    assert exact is not None
    execution = ParseDict(document["execution"], job_pb2.Execution())
    assert (execution.weights, execution.text_encoder_weights) == ("int8", "")
    assert exact["execution"].keys() == {"model", "scheduler", "shift"}


def test_a_png_has_no_quality_which_a_request_for_one_may_not_name() -> None:
    document = METADATA.document(parameters(), 0)
    assert document is not None
    assert "quality" not in document["spec"]


def test_files_say_no_more_than_the_operator_wants() -> None:
    for detail, has_mark in (("none", False), ("mark", True)):
        metadata = ImageMetadata(detail=detail, model="demo")  # type: ignore[arg-type]
        assert metadata.has_mark is has_mark
        assert metadata.text(parameters(), 0, is_ascii=False) is None
