"""What a model needs of memory in a layout, and whether that is there. Torch-free, pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from hidream_grpc.devices.base import CPU, DeviceMemory, DeviceType
from hidream_grpc.errors import InsufficientMemoryError
from hidream_grpc.model.model_weights import ModelWeights
from hidream_grpc.model.parallel.layout import Layout
from hidream_grpc.model.parallel.planner import LAYOUT_FLAG, ModelDivisions, allowed_layouts, plan_layout
from hidream_grpc.model.placement import activation_reserve_bytes, fits
from hidream_grpc.model.text_encoder_files import TextEncoderName

_GB = 1e9

_PROCESS_BYTES = 256 * 1024**2
_WORK_FRACTION = 8
"""A rank on a CPU works in 256 MiB and an eighth of its weights: steps, the autoencoder, cached prompts."""

_MAX_SUGGESTED_DEVICES = 16


@dataclass(frozen=True, slots=True)
class MemoryRequirements:
    """What the ranks of any layout of one model need on one type of device.

    Attributes:
        weights: of the checkpoint.
        divisions: that the checkpoint allows.
        device_type: of the ranks.
    """

    weights: ModelWeights
    divisions: ModelDivisions
    device_type: DeviceType

    def check(self, layout: Layout, devices: Mapping[int, DeviceMemory], host: DeviceMemory) -> None:
        """See that some ranks of a layout have room for what they load.

        Args:
            layout: of all ranks.
            devices: of the ranks that are about to load, which hold nothing yet.
            host: on which text encoders go that find no room on their device; on a CPU every rank is there.

        Raises:
            InsufficientMemoryError: they have not. The text says what is needed, and which layouts would fit.
        """
        if self.device_type is CPU:
            self._check_host(layout, devices, host)
        else:
            self._check_devices(layout, devices, host)

    # --- ranks on a CPU, which share the host's memory ----------------------------------------------

    def _check_host(self, layout: Layout, ranks: Mapping[int, DeviceMemory], host: DeviceMemory) -> None:
        weights_bytes, work_bytes = self._host_bytes(layout, tuple(ranks))
        if weights_bytes + work_bytes <= host.free_bytes:
            return
        num_ranks = "1 rank" if len(ranks) == 1 else f"{len(ranks)} ranks"
        raise InsufficientMemoryError(
            f"{LAYOUT_FLAG}: {layout} needs {_gb(weights_bytes + work_bytes)} of the host's memory "
            f"for {num_ranks} ({_gb(weights_bytes)} of weights, {_gb(work_bytes)} to work in), "
            f"which has {_gb(host.free_bytes)} free"
            + self._would_fit(layout, ranks, list(self._fitting_on_host(layout, host)))
        )

    def _host_bytes(self, layout: Layout, ranks: Sequence[int]) -> tuple[int, int]:
        """Of weights, and to work in, of these ranks together."""
        encoders = self.weights.text_encoders_of(layout)
        num_weights = len(ranks) * self.weights.without_text_encoders(layout)
        num_weights += sum(sum(encoders[rank].values()) for rank in ranks)
        weights_bytes = num_weights * CPU.bytes_per_weight
        return weights_bytes, len(ranks) * _PROCESS_BYTES + weights_bytes // _WORK_FRACTION

    def _fitting_on_host(self, asked: Layout, host: DeviceMemory) -> Iterator[str]:
        """The layout of most ranks, and the one that needs least."""
        totals = {
            layout: sum(self._host_bytes(layout, range(layout.world_size)))
            for layout in allowed_layouts(
                asked.world_size, self.divisions, asked.cfg_parallel, asked.data_parallel
            )
        }
        if fitting := [layout for layout, total_bytes in totals.items() if total_bytes <= host.free_bytes]:
            yield str(max(fitting, key=lambda layout: (layout.world_size, -totals[layout])))
            yield str(min(fitting, key=lambda layout: totals[layout]))

    # --- ranks with a device each ---------------------------------------------------------------------

    def _check_devices(self, layout: Layout, devices: Mapping[int, DeviceMemory], host: DeviceMemory) -> None:
        weights_bytes = self._device_bytes(layout)
        scarce = min(
            devices, key=lambda rank: devices[rank].free_bytes - activation_reserve_bytes(devices[rank])
        )
        if not fits(weights_bytes, memory := devices[scarce]):
            reserve_bytes = activation_reserve_bytes(memory)
            raise InsufficientMemoryError(
                f"{LAYOUT_FLAG}: {layout} needs {_gb(weights_bytes + reserve_bytes)} of each device "
                f"({_gb(weights_bytes)} of weights, {_gb(reserve_bytes)} to work in), "
                f"and that of rank {scarce} has {_gb(memory.free_bytes)} of {_gb(memory.total_bytes)} free"
                + self._would_fit(layout, devices, list(self._fitting_on_devices(memory, host)))
            )
        on_host = self._encoders_on_host(layout, devices)
        host_bytes = self._encoder_bytes(on_host)
        if host_bytes > host.free_bytes:
            raise InsufficientMemoryError(
                f"{LAYOUT_FLAG}: {layout} leaves no room on the devices for {_all_of(on_host)}: "
                f"on the host that needs {_gb(host_bytes)}, and there are {_gb(host.free_bytes)} free"
                + self._would_fit(layout, devices, list(self._fitting_on_devices(devices[scarce], host)))
            )

    def _device_bytes(self, layout: Layout) -> int:
        """Of what must be on a rank's device."""
        return self.weights.without_text_encoders(layout) * self.device_type.bytes_per_weight

    def _encoders_on_host(
        self, layout: Layout, devices: Mapping[int, DeviceMemory]
    ) -> tuple[TextEncoderName, ...]:
        """The text encoders that find no room on the devices of these ranks."""
        on_host = []
        for rank, encoders in enumerate(self.weights.text_encoders_of(layout)):
            if rank not in devices:
                continue
            free_bytes = devices[rank].free_bytes - self._device_bytes(layout)
            for name, num_weights in encoders.items():
                size_bytes = num_weights * self.device_type.bytes_per_weight
                if fits(size_bytes, DeviceMemory(devices[rank].total_bytes, free_bytes)):
                    free_bytes -= size_bytes
                else:
                    on_host.append(name)
        return tuple(on_host)

    def _encoder_bytes(self, on_host: Sequence[TextEncoderName]) -> int:
        return sum(self.weights.text_encoders[name] for name in on_host) * CPU.bytes_per_weight

    def _fitting_on_devices(self, memory: DeviceMemory, host: DeviceMemory) -> Iterator[str]:
        """The layout of fewest such devices, and that which has all text encoders on them."""
        has_one = False
        for num_devices in range(1, _MAX_SUGGESTED_DEVICES + 1):
            layout = plan_layout(num_devices, self.divisions)
            if layout.world_size < num_devices or not fits(self._device_bytes(layout), memory):
                continue
            on_host = self._encoders_on_host(layout, dict.fromkeys(range(num_devices), memory))
            if not on_host:
                yield str(layout)
                return
            if not has_one and self._encoder_bytes(on_host) <= host.free_bytes:
                has_one = True
                yield f"{layout} with {_all_of(on_host)} on the host"

    def _would_fit(self, layout: Layout, ranks: Mapping[int, DeviceMemory], fitting: Sequence[str]) -> str:
        """The end of the line; nothing where other ranks of the layout already hold their weights."""
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
