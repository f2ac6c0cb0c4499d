from __future__ import annotations

import pytest

from hidream_grpc.devices.device_types import CPU, CUDA, NPU, DeviceMemory, DeviceType
from hidream_grpc.errors import InsufficientMemoryError
from hidream_grpc.model.checkpoint.hidream_i1 import HIDREAM_I1
from hidream_grpc.model.checkpoint.sizes import ImageSize, SizeLimits
from hidream_grpc.model.checkpoint.text_encoders import TextEncoderName
from hidream_grpc.model.costs.model import ModelCosts, Workload
from hidream_grpc.model.memory_requirements import MemoryRequirements
from hidream_grpc.model.parallel.planner import parse_layout
from hidream_grpc.model.weight_format import WeightFormat, WeightFormats


def gigabytes(total: float, free: float | None = None) -> DeviceMemory:
    return DeviceMemory(int(total * 1e9), int((total if free is None else free) * 1e9))


def requirements_of(device_type: DeviceType, formats: WeightFormats | None = None) -> MemoryRequirements:
    """The requirements of the released model."""
    workload = Workload.new(
        ImageSize(1024, 1024), SizeLimits(16, 1024 * 1024), 8 * 1024 * 1024, device_type, has_guidance=True
    )
    return MemoryRequirements(ModelCosts(HIDREAM_I1, device_type, formats or WeightFormats()), workload)


def refusal(
    device_type: DeviceType,
    layout: str,
    memory: DeviceMemory,
    host: DeviceMemory,
    ranks: tuple[int, ...] | None = None,
) -> str:
    """The error line for the operator; empty where there is room."""
    try:
        warning(device_type, layout, memory, host, ranks)
    except InsufficientMemoryError as error:
        return str(error)
    return ""


def warning(
    device_type: DeviceType,
    layout: str,
    memory: DeviceMemory,
    host: DeviceMemory,
    ranks: tuple[int, ...] | None = None,
) -> str | None:
    """The line for the operator where there is little room."""
    parsed = parse_layout(layout)
    requirements = requirements_of(device_type)
    devices = dict.fromkeys(range(parsed.world_size) if ranks is None else ranks, memory)
    return requirements.check(parsed, devices, host)


def test_ranks_on_a_cpu_share_the_hosts_memory_and_the_line_says_what_would_fit() -> None:
    host = gigabytes(200, 180)
    assert refusal(CPU, "cfg=2", host, host) == (
        "--layout: cfg=2 needs 193.4 GB of the host's memory for 2 ranks "
        "(189.9 GB of weights, 3.6 GB to work in), which has 180.0 GB free; tp=2 or tp=1 would fit"
    )
    assert refusal(CPU, "tp=2", host, host) == refusal(CPU, "tp=1", host, host) == ""
    host = gigabytes(24)
    assert refusal(CPU, "cfg=2", host, host).endswith("has 24.0 GB free; no other layout would fit")


@pytest.mark.parametrize("device_type", [CUDA, NPU], ids=lambda device_type: device_type.name)
def test_a_device_that_is_too_small_is_told_with_layouts_and_places_of_text_encoders_that_fit(
    device_type: DeviceType,
) -> None:
    assert refusal(device_type, "tp=1", gigabytes(24, 23), gigabytes(128, 120)) == (
        "--layout: tp=1 needs 36.2 GB of each device (34.4 GB of weights, 1.8 GB to work in), and that of "
        "rank 0 has 23.0 GB of 24.0 GB free; tp=2 with Llama, T5, CLIP-G and CLIP-L on the host would fit"
    )
    assert refusal(device_type, "tp=1", gigabytes(35), gigabytes(20)).endswith("free; tp=4 would fit")
    assert refusal(device_type, "tp=1", gigabytes(32), gigabytes(128)).endswith(
        "free; tp=2 with Llama and T5 on the host or tp=4 would fit"
    )


def test_quantized_weights_fit_devices_of_half_the_memory() -> None:
    def result(memory_gb: float, **formats: WeightFormat) -> str:
        requirements = requirements_of(CUDA, WeightFormats(**formats))
        try:
            return requirements.check(parse_layout("tp=1"), {0: gigabytes(memory_gb)}, gigabytes(70)) or ""
        except InsufficientMemoryError as error:
            return str(error)

    assert "tp=1 needs 36.2 GB of each device (34.4 GB of weights, 1.8 GB to work in)" in result(24)
    assert result(24.4, transformer=WeightFormat.INT8) == ""
    assert result(18, transformer=WeightFormat.FLOAT8).startswith(
        "--layout: tp=1 needs 19.5 GB of each device (17.3 GB of weights, 2.2 GB to work in)"
    )


def test_embeddings_stay_where_text_encoders_are_quantized() -> None:
    exact = ModelCosts(HIDREAM_I1, CUDA).text_encoders_bytes[TextEncoderName.LLAMA]
    formats = WeightFormats(text_encoders=WeightFormat.INT8)
    quantized = ModelCosts(HIDREAM_I1, CUDA, formats).text_encoders_bytes[TextEncoderName.LLAMA]
    assert exact == 15_009_849_344
    # 128,256 embeddings of 4,096 numbers keep their two bytes.
    assert 0.52 * exact < quantized < exact / 2 + 128_256 * 4_096 * 1.05


def test_a_host_that_is_too_small_for_text_encoders_is_told() -> None:
    device = gigabytes(64)
    assert refusal(CUDA, "tp=1", device, gigabytes(20)) == ""
    assert refusal(CUDA, "tp=1", device, gigabytes(16)) == (
        "--layout: tp=1 leaves no room on the devices for T5: on the host that needs 19.0 GB, and there are "
        "16.0 GB free; tp=2 would fit"
    )


def test_every_rank_counts_towards_the_host_and_only_those_that_start() -> None:
    device, host = gigabytes(24, 23), gigabytes(40)
    # Llama of rank 0 needs 30 GB there, the others of rank 1 need 22.3.
    assert "leaves no room on the devices for Llama, T5, CLIP-G and CLIP-L" in refusal(
        CUDA, "tp=2", device, host
    )
    assert refusal(CUDA, "tp=2", device, host, ranks=(0,)) == ""
    assert refusal(CUDA, "tp=2", device, host, ranks=(1,)) == ""
    # Another layout is no help beside ranks that hold their weights.
    assert refusal(CUDA, "tp=2", device, gigabytes(10), ranks=(1,)).endswith("and there are 10.0 GB free")


def test_a_layout_that_divides_more_needs_less_and_whole_models_do_not() -> None:
    def needed(layout: str) -> float:
        return float(refusal(CUDA, layout, gigabytes(1), gigabytes(1)).split("(")[1].split(" GB")[0])

    assert needed("tp=1") == needed("cfg=2") == needed("dp=4")
    assert needed("tp=1") > needed("ep=2") > needed("tp=2") > needed("tp=2,ep=2") > needed("tp=4,ep=2")


def test_little_room_to_work_in_is_no_refusal_but_told() -> None:
    # Of an H200 that others use, too; a step of 8 samples takes 4.0 GB, a decoder 1.4 GB.
    assert warning(CUDA, "tp=1", gigabytes(150, 39), gigabytes(128)) == (
        "tp=1 leaves 4.6 GB to work in on the device of rank 0, less than 6.5 GB: "
        "large images, or several at once, may find no memory"
    )
    assert warning(CUDA, "tp=1", gigabytes(150, 60), gigabytes(128)) is None
    host = gigabytes(256, 200)
    assert warning(CPU, "cfg=2", host, host) == (
        "cfg=2 leaves 10.1 GB of the host's memory to work in, less than 16.4 GB: "
        "large images, or several at once, may find no memory"
    )
    assert warning(CPU, "tp=1", host, host) is None


@pytest.mark.parametrize(
    ("device_type", "memory", "host", "fits_total"),
    [
        (CUDA, gigabytes(80, 20), gigabytes(128), True),
        (CUDA, gigabytes(24, 20), gigabytes(128), False),
        (CUDA, gigabytes(64), gigabytes(128, 16), True),
        (CUDA, gigabytes(64), gigabytes(16), False),
        (CPU, gigabytes(128, 20), gigabytes(128, 20), True),
        (CPU, gigabytes(24, 20), gigabytes(24, 20), False),
    ],
)
def test_a_refusal_says_whether_memory_that_is_given_back_would_help(
    device_type: DeviceType, memory: DeviceMemory, host: DeviceMemory, fits_total: bool
) -> None:
    with pytest.raises(InsufficientMemoryError) as refused:
        warning(device_type, "tp=1", memory, host)
    assert refused.value.fits_total is fits_total


def test_text_encoders_leave_room_on_their_device_for_all_that_the_settings_allow() -> None:
    requirements = requirements_of(CUDA)
    alone, half = parse_layout("tp=1"), parse_layout("tp=2")
    # A step of 8 samples of 1024×1024, a decoder, prompts and kernels.
    assert requirements.reserve_bytes(alone) == 6_506_271_744
    assert requirements.encoders_on_host(alone, {0: gigabytes(64)}) == (TextEncoderName.T5,)
    assert requirements.encoders_on_host(half, dict.fromkeys(range(2), gigabytes(64))) == ()
    llama = requirements.costs.text_encoders_bytes[TextEncoderName.LLAMA]
    room = requirements.costs.weights_bytes(half) + requirements.reserve_bytes(half) + llama
    for free_bytes, on_host in ((room, ()), (room - 1, (TextEncoderName.LLAMA,))):
        assert requirements.encoders_on_host(half, {0: DeviceMemory(room, free_bytes)}) == on_host
