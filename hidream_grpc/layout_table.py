"""The table of `hidream-grpc plan`: what each layout and format of weights needs and does, and what fits."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec

from hidream_grpc.devices.device_types import DeviceMemory, DeviceSpeed, DeviceType
from hidream_grpc.model.checkpoint.configs import CheckpointConfigs, read_configs
from hidream_grpc.model.checkpoint.description import describe_checkpoint
from hidream_grpc.model.checkpoint.hidream_i1 import HIDREAM_I1
from hidream_grpc.model.checkpoint.prompt_lengths import TRAINED_PROMPT_TOKENS
from hidream_grpc.model.checkpoint.sizes import ImageSize, SizeLimits
from hidream_grpc.model.checkpoint.variants import MAX_SCALE_WITHOUT_GUIDANCE
from hidream_grpc.model.costs.choice import ORDERS, LayoutChooser, by_latency, unbeaten
from hidream_grpc.model.costs.model import ModelCosts, Workload
from hidream_grpc.model.memory_requirements import MemoryRequirements
from hidream_grpc.model.parallel.layout import Layout
from hidream_grpc.model.parallel.planner import LayoutWord, plan_layout
from hidream_grpc.model.weight_format import WeightFormat, WeightFormats

_GB = 1e9
_TFLOP = 1e12


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedModel:
    """The model that is planned for.

    Attributes:
        name: what the table calls it.
        configs: the configurations of its components.
        default_size: the size of an image that names none.
        size_limits: the sizes that can be generated.
        has_guidance: whether an image has two samples.
    """

    name: str
    configs: CheckpointConfigs
    default_size: ImageSize
    size_limits: SizeLimits
    has_guidance: bool

    @classmethod
    def released(cls) -> PlannedModel:
        """The published HiDream-I1-Full."""
        size = ImageSize(1024, 1024)
        return cls(
            name="HiDream-I1",
            configs=HIDREAM_I1,
            default_size=size,
            size_limits=SizeLimits(size_multiple=16, max_pixels=size.width * size.height),
            has_guidance=True,
        )

    @classmethod
    def from_checkpoint(cls, model_path: Path, extra_model_path: Path | None) -> PlannedModel:
        """The model of a folder.

        Raises:
            ModelNotFoundError: it is no complete checkpoint.
        """
        described = describe_checkpoint(model_path, extra_model_path)
        defaults = described.defaults
        return cls(
            name=described.name,
            configs=read_configs(model_path, extra_model_path),
            default_size=ImageSize(defaults.width, defaults.height),
            size_limits=described.size_limits,
            has_guidance=defaults.guidance_scale > MAX_SCALE_WITHOUT_GUIDANCE,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedDevices:
    """The devices that are planned for.

    Attributes:
        device_type: their type.
        num_devices: how many there are.
        device_memory: memory of each.
        host_memory: memory of the host.
        speed: how fast they compute, and send to each other.
        max_step_pixels: width × height × samples that a step may hold.
        max_prompt_tokens: most tokens of a prompt.
    """

    device_type: DeviceType
    num_devices: int
    device_memory: DeviceMemory
    host_memory: DeviceMemory
    speed: DeviceSpeed
    max_step_pixels: int
    max_prompt_tokens: int = TRAINED_PROMPT_TOKENS


@dataclass(frozen=True, slots=True, kw_only=True)
class LayoutRow:
    """One layout with one format of weights.

    Attributes:
        layout: as `--layout` takes it.
        num_devices: ranks of the layout.
        weights: the format of transformer and text encoders.
        chosen_by: the words of `--layout` that would choose it among those of its format.
        fits: whether there is room for the weights and the least work.
        has_room_for_largest_step: whether there is room for all that the settings allow.
        encoders_on_host: the text encoders that find no room on their devices.
        weights_bytes: transformer and autoencoder of the rank that holds most.
        text_encoders_bytes: text encoders on the device that holds most of them.
        host_bytes: text encoders on the host.
        step_bytes, decode_bytes, prompts_bytes, runtime_bytes: see `WorkBytes`, for the largest step.
        total_bytes: all that is on the device of a rank.
        step_flops: operations of a rank in a step of one image.
        step_bytes_sent: bytes that a rank sends in it.
        relative_step_seconds: time of that step ÷ that of one device.
        relative_images_per_second: images in full steps ÷ those of one device, in the same time.
    """

    layout: str
    num_devices: int
    weights: WeightFormat
    chosen_by: tuple[str, ...]
    fits: bool
    has_room_for_largest_step: bool
    encoders_on_host: tuple[str, ...]
    weights_bytes: int
    text_encoders_bytes: int
    host_bytes: int
    step_bytes: int
    decode_bytes: int
    prompts_bytes: int
    runtime_bytes: int
    total_bytes: int
    step_flops: int
    step_bytes_sent: int
    relative_step_seconds: float
    relative_images_per_second: float


def layout_rows(
    model: PlannedModel, devices: PlannedDevices, formats: Iterable[WeightFormat] = WeightFormat
) -> Iterator[LayoutRow]:
    """Yield each layout that no other beats in everything, and the table's, by format and time of a step."""
    workload = Workload.new(
        model.default_size,
        model.size_limits,
        devices.max_step_pixels,
        devices.device_type,
        has_guidance=model.has_guidance,
        max_prompt_tokens=devices.max_prompt_tokens,
    )
    for weights in formats:
        if weights is WeightFormat.FLOAT8 and not devices.device_type.has_float8:
            continue
        formats_of_model = WeightFormats(transformer=weights, text_encoders=weights)
        yield from _rows_of_format(
            ModelCosts(model.configs, devices.device_type, formats_of_model), workload, devices
        )


def _rows_of_format(costs: ModelCosts, workload: Workload, devices: PlannedDevices) -> Iterator[LayoutRow]:
    requirements = MemoryRequirements(costs, workload)
    chooser = LayoutChooser(requirements, devices.speed)
    device_memory, host_memory = devices.device_memory, devices.host_memory
    rated = {one.layout: one for one in chooser.rated(devices.num_devices)}
    alone = rated[Layout()]
    chosen = {LayoutWord.TABLE: plan_layout(devices.num_devices, costs.divisions)}
    for word in ORDERS:
        if (found := chooser.best(rated.values(), word, device_memory, host_memory)) is not None:
            chosen[word] = found.layout
    shown = {one.layout for one in unbeaten(rated.values())}.union(chosen.values())
    for one in sorted((rated[layout] for layout in shown), key=by_latency):
        layout, step = one.layout, costs.step(one.layout, workload.image)
        work = costs.work_bytes(layout, workload.largest)
        memory = dict.fromkeys(range(layout.world_size), device_memory)
        on_host = requirements.encoders_on_host(layout, memory)
        on_devices = max(
            sum(size for name, size in encoders.items() if name not in on_host)
            for encoders in costs.text_encoders_of(layout)
        )
        weights_bytes = costs.weights_bytes(layout)
        yield LayoutRow(
            layout=str(layout),
            num_devices=layout.world_size,
            weights=costs.formats.transformer,
            chosen_by=tuple(word for word, layout_of_word in chosen.items() if layout_of_word == layout),
            fits=requirements.fits(layout, device_memory, host_memory, workload.least),
            has_room_for_largest_step=requirements.fits(layout, device_memory, host_memory, workload.largest),
            encoders_on_host=on_host,
            weights_bytes=weights_bytes,
            text_encoders_bytes=on_devices,
            host_bytes=requirements.host_bytes(on_host),
            step_bytes=work.step_bytes,
            decode_bytes=work.decode_bytes,
            prompts_bytes=work.prompts_bytes,
            runtime_bytes=work.runtime_bytes,
            total_bytes=weights_bytes + on_devices + work.total_bytes,
            step_flops=step.flops,
            step_bytes_sent=step.bytes_sent,
            relative_step_seconds=round(one.image_seconds / alone.image_seconds, 4),
            relative_images_per_second=round(one.images_per_second / alone.images_per_second, 4),
        )


_HEADINGS = (
    *("layout", "devices", "weights", "GB: weights", "encoders", "step", "decode", "other", "all"),
    *("on the host", "fits", "TFLOP", "GB sent", "time", "images", ""),
)


def as_text(rows: Iterable[LayoutRow]) -> str:
    """The rows as a table of aligned columns, a line each."""
    cells = [_HEADINGS, *map(_cells, rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if index in {0, 2, 10, 15} else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in cells
    )


def _cells(row: LayoutRow) -> tuple[str, ...]:
    fits = "yes" if row.has_room_for_largest_step else "small steps" if row.fits else "no"
    return (
        row.layout,
        str(row.num_devices),
        row.weights,
        _gb(row.weights_bytes),
        _gb(row.text_encoders_bytes),
        _gb(row.step_bytes),
        _gb(row.decode_bytes),
        _gb(row.prompts_bytes + row.runtime_bytes),
        _gb(row.total_bytes),
        _gb(row.host_bytes) if row.host_bytes else "",
        fits,
        f"{row.step_flops / _TFLOP:.1f}",
        _gb(row.step_bytes_sent),
        f"{row.relative_step_seconds:.2f}",
        f"{row.relative_images_per_second:.2f}",
        " ".join(row.chosen_by),
    )


def as_json(model: PlannedModel, rows: Iterable[LayoutRow]) -> bytes:
    """One object: the name of the model, and the rows with all their attributes."""
    return msgspec.json.encode({"model": model.name, "has_guidance": model.has_guidance, "rows": list(rows)})


def _gb(num_bytes: int) -> str:
    return f"{num_bytes / _GB:.1f}"
