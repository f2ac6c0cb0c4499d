"""How much memory a model needs in a layout, and whether it is there. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from hidream_grpc.devices.device_types import CPU, DeviceMemory, DeviceType
from hidream_grpc.errors import InsufficientMemoryError
from hidream_grpc.model.checkpoint.text_encoders import TextEncoderName
from hidream_grpc.model.model_weights import ModelWeights
from hidream_grpc.model.parallel.layout import Layout
from hidream_grpc.model.parallel.planner import LAYOUT_FLAG, ModelDivisions, allowed_layouts, plan_layout
from hidream_grpc.model.prompts.assignment import activation_reserve_bytes, fits
from hidream_grpc.model.weight_format import WeightFormats

_GB = 1e9

_MIN_DEVICE_WORK_BYTES = 1024**3
"""Least memory beside the weights on a device: for steps and decoding of one image of 512x512 at a time."""

_DEQUANTIZED_BYTES = 300 * 1024**2
"""Memory for the layer that is dequantized at the moment: the largest of the released model is 270 MiB."""

_MIN_HOST_WORK_BYTES = 256 * 1024**2
"""Least memory of a rank on a CPU: for its process, steps and decoding of one image of 256x256 at a time."""

_HOST_WORK_FRACTION = 8
"""A rank on a CPU has an eighth of its weights in addition, for larger images and cached prompts."""

_SCARCE = "large images, or several at once, may find no memory"

_MAX_SUGGESTED_DEVICES = 16


@dataclass(frozen=True, slots=True)
class MemoryRequirements:
    """The memory that the ranks of any layout of one model need on one type of device.

    Attributes:
        weights: numbers of weights of the checkpoint.
        divisions: how the model can be divided.
        device_type: type of the ranks' devices.
        formats: formats in which the ranks hold the weights.
    """

    weights: ModelWeights
    divisions: ModelDivisions
    device_type: DeviceType
    formats: WeightFormats = field(default_factory=WeightFormats)

    def check(self, layout: Layout, devices: Mapping[int, DeviceMemory], host: DeviceMemory) -> str | None:
        """Check that some ranks of a layout have room for what they load.

        Args:
            layout: the layout of all ranks.
            devices: memory of the devices of the ranks that are about to load, which hold nothing yet.
            host: memory of the host, which takes text encoders that find no room on their device, and on a
                CPU all ranks.

        Returns:
            A line for the operator where the ranks can load, but have little memory left to work in.

        Raises:
            InsufficientMemoryError: there is no room even for the least work. The text says what is needed,
                and which layouts would fit.
        """
        if self.device_type is CPU:
            return self._check_host(layout, devices, host)
        return self._check_devices(layout, devices, host)

    # --- ranks on a CPU, which share the host's memory ----------------------------------------------

    def _check_host(
        self, layout: Layout, ranks: Mapping[int, DeviceMemory], host: DeviceMemory
    ) -> str | None:
        weights_bytes = self._host_weights_bytes(layout, tuple(ranks))
        min_work_bytes = len(ranks) * _MIN_HOST_WORK_BYTES
        needed_bytes = weights_bytes + min_work_bytes
        if needed_bytes > host.free_bytes:
            num_ranks = "1 rank" if len(ranks) == 1 else f"{len(ranks)} ranks"
            raise InsufficientMemoryError(
                f"{LAYOUT_FLAG}: {layout} needs {_gb(needed_bytes)} of the host's memory "
                f"for {num_ranks} ({_gb(weights_bytes)} of weights, {_gb(min_work_bytes)} to work in), "
                f"which has {_gb(host.free_bytes)} free"
                + self._would_fit(layout, ranks, list(self._fitting_on_host(layout, host))),
                fits_total=needed_bytes <= host.total_bytes,
            )
        left_bytes = host.free_bytes - weights_bytes
        wanted_bytes = min_work_bytes + weights_bytes // _HOST_WORK_FRACTION
        if left_bytes >= wanted_bytes:
            return None
        return (
            f"{layout} leaves {_gb(left_bytes)} of the host's memory to work in, less than "
            f"{_gb(wanted_bytes)}: {_SCARCE}"
        )

    def _host_weights_bytes(self, layout: Layout, ranks: Sequence[int]) -> int:
        """Bytes of the weights of these ranks together."""
        encoders = self.weights.text_encoders_of(layout)
        return len(ranks) * self._device_bytes(layout) + sum(
            self._encoder_device_bytes(name) for rank in ranks for name in encoders[rank]
        )

    def _fitting_on_host(self, asked: Layout, host: DeviceMemory) -> Iterator[str]:
        """Yield the layout of most ranks that fits the host, and the one that needs least memory."""
        totals = {
            layout: self._host_weights_bytes(layout, range(layout.world_size))
            + layout.world_size * _MIN_HOST_WORK_BYTES
            for layout in allowed_layouts(asked.world_size, self.divisions, asked)
        }
        if fitting := [layout for layout, total_bytes in totals.items() if total_bytes <= host.free_bytes]:
            yield str(max(fitting, key=lambda layout: (layout.world_size, -totals[layout])))
            yield str(min(fitting, key=lambda layout: totals[layout]))

    # --- ranks with a device each ---------------------------------------------------------------------

    def _check_devices(
        self, layout: Layout, devices: Mapping[int, DeviceMemory], host: DeviceMemory
    ) -> str | None:
        weights_bytes = self._device_bytes(layout)
        needed_bytes = weights_bytes + self._min_device_work_bytes
        scarce = min(devices, key=lambda rank: devices[rank].free_bytes)
        memory = devices[scarce]
        if needed_bytes > memory.free_bytes:
            raise InsufficientMemoryError(
                f"{LAYOUT_FLAG}: {layout} needs {_gb(needed_bytes)} of each device "
                f"({_gb(weights_bytes)} of weights, {_gb(self._min_device_work_bytes)} to work in), "
                f"and that of rank {scarce} has {_gb(memory.free_bytes)} of {_gb(memory.total_bytes)} free"
                + self._would_fit(layout, devices, list(self._fitting_on_devices(memory, host))),
                fits_total=all(needed_bytes <= device.total_bytes for device in devices.values()),
            )
        on_host = self._encoders_on_host(layout, devices)
        host_bytes = self._encoder_bytes(on_host)
        if host_bytes > host.free_bytes:
            raise InsufficientMemoryError(
                f"{LAYOUT_FLAG}: {layout} leaves no room on the devices for {_all_of(on_host)}: "
                f"on the host that needs {_gb(host_bytes)}, and there are {_gb(host.free_bytes)} free"
                + self._would_fit(layout, devices, list(self._fitting_on_devices(memory, host))),
                fits_total=host_bytes <= host.total_bytes,
            )
        if fits(weights_bytes, memory):
            return None
        return (
            f"{layout} leaves {_gb(memory.free_bytes - weights_bytes)} to work in on the device of rank "
            f"{scarce}, less than {_gb(activation_reserve_bytes(memory))}: {_SCARCE}"
        )

    def _device_bytes(self, layout: Layout) -> int:
        """Bytes of what must be on a rank's device."""
        exact = self.device_type.bytes_per_weight
        return self.weights.bytes_without_text_encoders(layout, self.formats.transformer, exact)

    @property
    def _min_device_work_bytes(self) -> int:
        """Least memory beside the weights on a device."""
        of_layer = _DEQUANTIZED_BYTES if self.formats.transformer.is_quantized else 0
        return _MIN_DEVICE_WORK_BYTES + of_layer

    def _encoder_device_bytes(self, name: TextEncoderName) -> int:
        """Bytes of a text encoder on the device of its rank."""
        exact = self.device_type.bytes_per_weight
        return self.weights.text_encoder_bytes(name, self.formats.text_encoders, exact)

    def _encoders_on_host(
        self, layout: Layout, devices: Mapping[int, DeviceMemory]
    ) -> tuple[TextEncoderName, ...]:
        """The text encoders that find no room on the devices of these ranks."""
        on_host = []
        for rank, encoders in enumerate(self.weights.text_encoders_of(layout)):
            if rank not in devices:
                continue
            free_bytes = devices[rank].free_bytes - self._device_bytes(layout)
            for name in encoders:
                size_bytes = self._encoder_device_bytes(name)
                if fits(size_bytes, DeviceMemory(devices[rank].total_bytes, free_bytes)):
                    free_bytes -= size_bytes
                else:
                    on_host.append(name)
        return tuple(on_host)

    def _encoder_bytes(self, on_host: Sequence[TextEncoderName]) -> int:
        return sum(self.weights.text_encoders[name] for name in on_host) * CPU.bytes_per_weight

    def _fitting_on_devices(self, memory: DeviceMemory, host: DeviceMemory) -> Iterator[str]:
        """The layout of fewest devices that fits, and the one that has all text encoders on devices."""
        has_one = False
        for num_devices in range(1, _MAX_SUGGESTED_DEVICES + 1):
            layout = plan_layout(num_devices, self.divisions)
            if layout.world_size < num_devices:
                continue
            if self._device_bytes(layout) + self._min_device_work_bytes > memory.free_bytes:
                continue
            on_host = self._encoders_on_host(layout, dict.fromkeys(range(num_devices), memory))
            if not on_host:
                yield str(layout)
                return
            if not has_one and self._encoder_bytes(on_host) <= host.free_bytes:
                has_one = True
                yield f"{layout} with {_all_of(on_host)} on the host"

    def _would_fit(self, layout: Layout, ranks: Mapping[int, DeviceMemory], fitting: Sequence[str]) -> str:
        """The layouts that would fit, as an error says it; empty once other ranks hold their weights."""
        if len(ranks) < layout.world_size:
            return ""
        if not fitting:
            return "; no other layout would fit"
        return f"; {' or '.join(dict.fromkeys(fitting))} would fit"


def _all_of(names: Sequence[TextEncoderName]) -> str:
    *others, last = names
    return f"{', '.join(others)} and {last}" if others else str(last)


def _gb(num_bytes: int) -> str:
    return f"{num_bytes / _GB:,.1f} GB"
