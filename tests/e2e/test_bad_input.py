"""Nothing bad reaches a rank: every violation against the live server, and hundreds of random ones."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_status import rpc_status
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hidream.v1 import image_gen_pb2, image_gen_pb2_grpc, image_pb2, server_info_pb2
from hidream_grpc.settings import Settings
from tests.support.live_server import LiveServer
from tests.support.streams import follow, request

NUM_EXAMPLES = 200
MANY_EXAMPLES = 1500
GENERATE = "/hidream.v1.ImageGen/Generate"

Change = Callable[[image_gen_pb2.GenerateRequest, server_info_pb2.RequestLimits], object]


def raw_generate(channel: grpc.Channel) -> Any:
    """Generate, for bytes that no stub would send."""
    return channel.unary_stream(
        GENERATE, request_serializer=None, response_deserializer=image_gen_pb2.GenerateResponse.FromString
    )


def refused(call: Any) -> grpc.RpcError:
    """The error that a call ends with before its first response."""
    with pytest.raises(grpc.RpcError) as error:
        follow(call)
    return error.value


def violations_of(error: grpc.RpcError) -> dict[str, str]:
    """The fields of the error's BadRequest, with what would be accepted."""
    assert isinstance(error, grpc.Call)
    assert error.code() == grpc.StatusCode.INVALID_ARGUMENT, error.details()
    status = rpc_status.from_call(error)
    assert status is not None
    bad_request = error_details_pb2.BadRequest()
    assert status.details[0].Unpack(bad_request)
    return {violation.field: violation.description for violation in bad_request.field_violations}


def spec(**fields: Any) -> Change:
    """Set fields of the spec; a function is called with the limits."""

    def change(message: image_gen_pb2.GenerateRequest, limits: server_info_pb2.RequestLimits) -> None:
        for name, value in fields.items():
            setattr(message.spec, name, value(limits) if callable(value) else value)

    return change


BAD: dict[str, tuple[Change, str]] = {
    "empty prompt": (spec(prompt=""), "spec.prompt"),
    "blank prompt": (spec(prompt=" \t\n"), "spec.prompt"),
    "prompt of too many bytes": (
        spec(prompt=lambda limits: "x" * (limits.max_prompt_bytes + 1)),
        "spec.prompt",
    ),
    "prompt of too many tokens": (spec(prompt=lambda limits: "a " * limits.max_prompt_tokens), "spec.prompt"),
    "prompt with NUL": (spec(prompt="a\0b"), "spec.prompt"),
    "long negative prompt": (spec(negative_prompt="a " * 2000), "spec.negative_prompt"),
    "negative prompt without guidance": (spec(negative_prompt="a", guidance_scale=1), "spec.negative_prompt"),
    "width is no multiple": (spec(width=lambda limits: 128 + limits.size_multiple // 2), "spec.width"),
    "small height": (
        spec(height=lambda limits: limits.min_side_pixels - limits.size_multiple),
        "spec.height",
    ),
    "negative width": (spec(width=-128), "spec.width"),
    "too many pixels": (spec(width=lambda limits: limits.max_pixels // 64 + 64, height=64), "spec.width"),
    "no steps": (spec(num_inference_steps=0), "spec.num_inference_steps"),
    "many steps": (
        spec(num_inference_steps=lambda limits: limits.max_num_inference_steps + 1),
        "spec.num_inference_steps",
    ),
    "no images": (spec(num_images=0), "spec.num_images"),
    "many images": (spec(num_images=lambda limits: limits.max_num_images + 1), "spec.num_images"),
    "negative guidance": (spec(guidance_scale=-0.5), "spec.guidance_scale"),
    "strong guidance": (
        spec(guidance_scale=lambda limits: limits.max_guidance_scale + 0.01),
        "spec.guidance_scale",
    ),
    "guidance is not a number": (spec(guidance_scale=math.nan), "spec.guidance_scale"),
    "infinite guidance": (spec(guidance_scale=math.inf), "spec.guidance_scale"),
    "negative seed": (spec(seed=-1), "spec.seed"),
    "large seed": (spec(seed=lambda limits: limits.max_seed + 1), "spec.seed"),
    "unknown format": (spec(output_format=77), "spec.output_format"),
    "no quality": (spec(output_format=image_pb2.OUTPUT_FORMAT_JPEG, quality=0), "spec.quality"),
    "too much quality": (spec(output_format=image_pb2.OUTPUT_FORMAT_WEBP, quality=101), "spec.quality"),
    "quality of PNG": (spec(quality=50), "spec.quality"),
    "wider than a WebP": (
        spec(output_format=image_pb2.OUTPUT_FORMAT_WEBP, width=16_384, height=64),
        "spec.width",
    ),
    "width alone": (lambda message, _: message.spec.ClearField("height"), "spec.height"),
    "height alone": (lambda message, _: message.spec.ClearField("width"), "spec.width"),
    "unknown priority": (lambda message, _: setattr(message, "priority", 9), "priority"),
    "request id with spaces": (lambda message, _: setattr(message, "request_id", "a b"), "request_id"),
    "long request id": (
        lambda message, limits: setattr(message, "request_id", "r" * (limits.max_request_id_bytes + 1)),
        "request_id",
    ),
    "many labels": (
        lambda message, limits: message.labels.update({str(n): "" for n in range(limits.max_labels + 1)}),
        "labels",
    ),
    "label without key": (lambda message, _: message.labels.update({"": "x"}), "labels[]"),
    "long label": (
        lambda message, limits: message.labels.update({"k": "x" * (limits.max_label_bytes + 1)}),
        "labels[k]",
    ),
}


@pytest.mark.parametrize(("change", "field"), BAD.values(), ids=list(BAD))
def test_each_bad_field_is_named(
    stub: image_gen_pb2_grpc.ImageGenStub, server: LiveServer, change: Change, field: str
) -> None:
    message = request(num_inference_steps=1)
    change(message, server.info().limits)
    assert field in violations_of(refused(stub.Generate(message)))


def test_the_limit_itself_is_accepted(stub: image_gen_pb2_grpc.ImageGenStub, server: LiveServer) -> None:
    limits = server.info().limits
    message = request(
        "a red circle",
        width=limits.min_side_pixels,
        height=limits.min_side_pixels,
        num_inference_steps=1,
        guidance_scale=limits.max_guidance_scale,
        num_images=limits.max_num_images,
        seed=limits.max_seed,
        request_id="~" * limits.max_request_id_bytes,
    )
    message.labels.update({f"{n:0{limits.max_label_bytes}}": "" for n in range(limits.max_labels)})
    assert len(follow(stub.Generate(message)).images) == limits.max_num_images


def test_all_violations_are_told_at_once_with_their_limits(
    stub: image_gen_pb2_grpc.ImageGenStub, server: LiveServer
) -> None:
    limits = server.info().limits
    message = request(
        "",
        negative_prompt="\0",
        width=65,
        height=-1,
        num_inference_steps=0,
        guidance_scale=math.nan,
        num_images=99,
        seed=-5,
        output_format=7,
        quality=101,
        request_id="a b",
    )
    message.priority = 9  # type: ignore[assignment]
    for number in range(100):
        message.labels["界" * 100 + str(number)] = ""
    told = violations_of(refused(stub.Generate(message)))
    fields = {f"spec.{field.name}" for field in image_pb2.ImageSpec.DESCRIPTOR.fields}
    assert fields | {"request_id", "priority", "labels"} <= set(told)
    assert str(limits.max_num_inference_steps) in told["spec.num_inference_steps"]
    assert str(limits.max_num_images) in told["spec.num_images"]
    assert str(limits.max_seed) in told["spec.seed"]
    assert str(limits.size_multiple) in told["spec.width"]


def test_a_request_without_a_spec_is_told_so(stub: image_gen_pb2_grpc.ImageGenStub) -> None:
    assert "spec" in violations_of(refused(stub.Generate(image_gen_pb2.GenerateRequest())))


@pytest.mark.parametrize(
    "data",
    [b"\x0a\x05\x0a\x03a\xff\xfe", b"\xff" * 100, b"\x0a\x7f", b"\x00", bytes(1000)],
    ids=["prompt is not UTF-8", "no message", "cut off", "field 0", "zeros"],
)
def test_bytes_that_are_no_request_are_an_invalid_argument(server: LiveServer, data: bytes) -> None:
    with grpc.insecure_channel(server.address) as channel:
        told = violations_of(refused(raw_generate(channel)(data)))
    assert "does not parse" in told[""]


def test_a_message_over_the_size_limit_is_refused(
    stub: image_gen_pb2_grpc.ImageGenStub, server: LiveServer
) -> None:
    limit = server.info().limits.max_receive_message_bytes
    error = refused(stub.Generate(request("x" * limit)))
    assert isinstance(error, grpc.Call)
    assert error.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "spec.prompt" in violations_of(refused(stub.Generate(request("x" * (limit - 200)))))


def test_the_limits_shown_are_those_of_the_settings(server: LiveServer) -> None:
    limits = server.info().limits
    shown = {
        field.name: getattr(limits, field.name)
        if not field.has_presence or limits.HasField(field.name)  # type: ignore[arg-type]
        else None
        for field in limits.DESCRIPTOR.fields
    }
    assert 0 not in shown.values()
    # What the server of these tests is started with, and what the demo model's tokenizers allow.
    expected = {"max_streams_per_caller": 1000, "max_prompt_tokens": 64}
    for name in shown.keys() & Settings.model_fields.keys():
        assert shown[name] == expected.get(name, Settings.model_fields[name].default), name


def test_no_line_of_the_log_holds_a_prompt(stub: image_gen_pb2_grpc.ImageGenStub, server: LiveServer) -> None:
    name = "prompt-privacy"
    num_lines = len(server.log_lines)
    accepted = request("a zeppelin", negative_prompt="a xylophone", num_inference_steps=1, request_id=name)
    follow(stub.Generate(accepted))
    refused(stub.Generate(request("a zeppelin " * 1000)))
    refused(stub.Generate(request("a zeppelin, again", request_id=name)))
    assert server.logged_lines("Generate ALREADY_EXISTS", after=num_lines)
    assert "prompt-privacy" in server.log
    assert "zeppelin" not in server.log
    assert "xylophone" not in server.log


int32 = st.one_of(st.integers(-(2**31), 2**31 - 1), st.integers(-2, 200))
text = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)


def spec_of(fields: dict[str, Any]) -> image_pb2.ImageSpec:
    return image_pb2.ImageSpec(**fields)


specs = st.fixed_dictionaries(
    {},
    optional={
        "prompt": text,
        "negative_prompt": text,
        "width": int32,
        "height": int32,
        "num_inference_steps": int32,
        "guidance_scale": st.floats(width=32),
        "num_images": int32,
        "seed": st.integers(-(2**63), 2**63 - 1),
        "output_format": st.integers(-3, 6),
        "quality": int32,
    },
).map(spec_of)
# None of these is accepted whatever the spec says: a large picture would keep the ranks busy.
bad_requests = st.builds(
    image_gen_pb2.GenerateRequest,
    spec=specs,
    request_id=text,
    preview=st.booleans(),
    detached=st.booleans(),
    priority=st.integers(-(2**31), 2**31 - 1).filter(lambda priority: not 0 <= priority <= 3),
    labels=st.dictionaries(text, text, max_size=3),
)
TWICE_BAD = request(num_inference_steps=1, width=64, height=64, seed=-1)
TWICE_BAD.priority = 99  # type: ignore[assignment]
mutations = st.lists(st.tuples(st.integers(0, TWICE_BAD.ByteSize() - 1), st.binary(max_size=3)), max_size=5)


@pytest.mark.parametrize("num_examples", [NUM_EXAMPLES, pytest.param(MANY_EXAMPLES, marks=pytest.mark.long)])
def test_hundreds_of_bad_requests_leave_the_service_as_it_was(server: LiveServer, num_examples: int) -> None:
    before = server.info()
    with grpc.insecure_channel(server.address) as channel:
        call = raw_generate(channel)

        @given(bad_requests)
        @settings(max_examples=num_examples, suppress_health_check=list(HealthCheck))
        def random_requests_are_refused_in_detail(message: image_gen_pb2.GenerateRequest) -> None:
            assert "priority" in violations_of(refused(call(message.SerializeToString())))

        @given(mutations)
        @settings(max_examples=num_examples, suppress_health_check=list(HealthCheck))
        def mutated_messages_are_refused_or_mean_something(changes: list[tuple[int, bytes]]) -> None:
            data = bytearray(TWICE_BAD.SerializeToString())
            for position, replacement in changes:
                data[position : position + 1] = replacement
            responses = call(bytes(data))
            try:
                next(responses)
            except grpc.RpcError as error:
                assert violations_of(error)
            else:
                responses.cancel()

        random_requests_are_refused_in_detail()
        mutated_messages_are_refused_or_mean_something()
        health = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
    server.wait_until_idle()
    after = server.info()
    assert health.status == health_pb2.HealthCheckResponse.SERVING
    assert after.state == server_info_pb2.SERVER_STATE_SERVING
    assert after.num_rank_restarts == before.num_rank_restarts
    assert after.jobs.failed == before.jobs.failed
    with server.stub() as stub:
        assert len(follow(stub.Generate(request(num_inference_steps=1))).images) == 1
