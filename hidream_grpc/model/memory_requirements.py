"""Whether the ranks of a layout have the memory that they need. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from hidream_grpc.devices.device_types import CPU, DeviceMemory
from hidream_grpc.errors import InsufficientMemoryError
from hidream_grpc.model.checkpoint.step_shapes import StepShape
from hidream_grpc.model.checkpoint.text_encoders import TextEncoderName
from hidream_grpc.model.costs.model import ModelCosts, Workload
from hidream_grpc.model.parallel.layout import Layout
from hidream_grpc.model.parallel.planner import LAYOUT_FLAG, allowed_layouts, plan_layout

_GB = 1e9

_SCARCE = "large images, or several at once, may find no memory"

_MAX_SUGGESTED_DEVICES = 16


@dataclass(frozen=True, slots=True)
class MemoryRequirements:
    """The memory that the ranks of any layout of one model need on one type of device.

    Attributes:
        costs: what the ranks hold.
        workload: the steps that they shall have room for.
    """

    costs: ModelCosts
    workload: Workload

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
        if self.costs.device_type is CPU:
            return self._check_host(layout, devices, host)
        return self._check_devices(layout, devices, host)

    def fits(self, layout: Layout, device: DeviceMemory, host: DeviceMemory, step: StepShape) -> bool:
        """Whether all ranks of a layout have room for their weights and for steps of a shape.

        Args:
            layout: the layout.
            device: memory of each device, which holds nothing yet.
            host: memory of the host.
            step: the shape of the steps.
        """
        work_bytes = self.costs.work_bytes(layout, step).total_bytes
        if self.costs.device_type is CPU:
            ranks = range(layout.world_size)
            return self._host_weights_bytes(layout, ranks) + len(ranks) * work_bytes <= host.free_bytes
        if self.costs.weights_bytes(layout) + work_bytes > device.free_bytes:
            return False
        on_host = self.encoders_on_host(layout, dict.fromkeys(range(layout.world_size), device))
        return self.host_bytes(on_host) <= host.free_bytes

    # --- ranks on a CPU, which share the host's memory ----------------------------------------------

    def _check_host(
        self, layout: Layout, ranks: Mapping[int, DeviceMemory], host: DeviceMemory
    ) -> str | None:
        weights_bytes = self._host_weights_bytes(layout, tuple(ranks))
        work_bytes = len(ranks) * self._least_work_bytes(layout)
        needed_bytes = weights_bytes + work_bytes
        if needed_bytes > host.free_bytes:
            num_ranks = "1 rank" if len(ranks) == 1 else f"{len(ranks)} ranks"
            raise InsufficientMemoryError(
                f"{LAYOUT_FLAG}: {layout} needs {_gb(needed_bytes)} of the host's memory "
                f"for {num_ranks} ({_gb(weights_bytes)} of weights, {_gb(work_bytes)} to work in), "
                f"which has {_gb(host.free_bytes)} free"
                + self._would_fit(layout, ranks, list(self._fitting_on_host(layout, host))),
                fits_total=needed_bytes <= host.total_bytes,
            )
        left_bytes = host.free_bytes - weights_bytes
        wanted_bytes = len(ranks) * self.reserve_bytes(layout)
        if left_bytes >= wanted_bytes:
            return None
        return (
            f"{layout} leaves {_gb(left_bytes)} of the host's memory to work in, less than "
            f"{_gb(wanted_bytes)}: {_SCARCE}"
        )

    def _host_weights_bytes(self, layout: Layout, ranks: Sequence[int]) -> int:
        """Bytes of the weights of these ranks together."""
        encoders = self.costs.text_encoders_of(layout)
        return sum(self.costs.weights_bytes(layout, rank) + sum(encoders[rank].values()) for rank in ranks)

    def _fitting_on_host(self, asked: Layout, host: DeviceMemory) -> Iterator[str]:
        """Yield the layout of most ranks that fits the host, and the one that needs least memory."""
        totals = {
            layout: self._host_weights_bytes(layout, range(layout.world_size))
            + layout.world_size * self._least_work_bytes(layout)
            for layout in allowed_layouts(asked.world_size, self.costs.divisions, asked)
        }
        if fitting := [layout for layout, total_bytes in totals.items() if total_bytes <= host.free_bytes]:
            yield str(max(fitting, key=lambda layout: (layout.world_size, -totals[layout])))
            yield str(min(fitting, key=lambda layout: totals[layout]))

    # --- ranks with a device each ---------------------------------------------------------------------

    def _check_devices(
        self, layout: Layout, devices: Mapping[int, DeviceMemory], host: DeviceMemory
    ) -> str | None:
        weights_bytes, work_bytes = self.costs.weights_bytes(layout), self._least_work_bytes(layout)
        needed_bytes = weights_bytes + work_bytes
        scarce = min(devices, key=lambda rank: devices[rank].free_bytes)
        memory = devices[scarce]
        if needed_bytes > memory.free_bytes:
            raise InsufficientMemoryError(
                f"{LAYOUT_FLAG}: {layout} needs {_gb(needed_bytes)} of each device "
                f"({_gb(weights_bytes)} of weights, {_gb(work_bytes)} to work in), "
                f"and that of rank {scarce} has {_gb(memory.free_bytes)} of {_gb(memory.total_bytes)} free"
                + self._would_fit(layout, devices, list(self._fitting_on_devices(memory, host))),
                fits_total=all(needed_bytes <= device.total_bytes for device in devices.values()),
            )
        on_host = self.encoders_on_host(layout, devices)
        host_bytes = self.host_bytes(on_host)
        if host_bytes > host.free_bytes:
            raise InsufficientMemoryError(
                f"{LAYOUT_FLAG}: {layout} leaves no room on the devices for {_all_of(on_host)}: "
                f"on the host that needs {_gb(host_bytes)}, and there are {_gb(host.free_bytes)} free"
                + self._would_fit(layout, devices, list(self._fitting_on_devices(memory, host))),
                fits_total=host_bytes <= host.total_bytes,
            )
        left_bytes, wanted_bytes = memory.free_bytes - weights_bytes, self.reserve_bytes(layout)
        if left_bytes >= wanted_bytes:
            return None
        return (
            f"{layout} leaves {_gb(left_bytes)} to work in on the device of rank "
            f"{scarce}, less than {_gb(wanted_bytes)}: {_SCARCE}"
        )

    def encoders_on_host(
        self, layout: Layout, devices: Mapping[int, DeviceMemory]
    ) -> tuple[TextEncoderName, ...]:
        """The text encoders that find no room on the devices of these ranks; none on a CPU."""
        if self.costs.device_type is CPU:
            return ()
        on_host = []
        weights_bytes, reserve_bytes = self.costs.weights_bytes(layout), self.reserve_bytes(layout)
        for rank, encoders in enumerate(self.costs.text_encoders_of(layout)):
            if rank not in devices:
                continue
            free_bytes = devices[rank].free_bytes - weights_bytes
            for name, size_bytes in encoders.items():
                if free_bytes - size_bytes >= reserve_bytes:
                    free_bytes -= size_bytes
                else:
                    on_host.append(name)
        return tuple(on_host)

    def host_bytes(self, on_host: Sequence[TextEncoderName]) -> int:
        """Bytes of these text encoders on the host."""
        return sum(self.costs.text_encoders_host_bytes[name] for name in on_host)

    def _fitting_on_devices(self, memory: DeviceMemory, host: DeviceMemory) -> Iterator[str]:
        """The layout of fewest devices that fits, and the one that has all text encoders on devices."""
        has_one = False
        for num_devices in range(1, _MAX_SUGGESTED_DEVICES + 1):
            layout = plan_layout(num_devices, self.costs.divisions)
            if layout.world_size < num_devices:
                continue
            if self.costs.weights_bytes(layout) + self._least_work_bytes(layout) > memory.free_bytes:
                continue
            on_host = self.encoders_on_host(layout, dict.fromkeys(range(num_devices), memory))
            if not on_host:
                yield str(layout)
                return
            if not has_one and self.host_bytes(on_host) <= host.free_bytes:
                has_one = True
                yield f"{layout} with {_all_of(on_host)} on the host"

    def _least_work_bytes(self, layout: Layout) -> int:
        return self.costs.work_bytes(layout, self.workload.least).total_bytes

    def reserve_bytes(self, layout: Layout) -> int:
        """Memory that stays free of text encoders on a rank's device, for all that the settings allow."""
        return self.costs.work_bytes(layout, self.workload.largest).total_bytes

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
