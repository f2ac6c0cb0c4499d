"""Which devices a rank group works on, and in which layout. Pure.

It starts with the layout that was asked for, on the first devices that there are. Devices that fail are
passed over; with too few left the next smaller layout serves, down to one device.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from hidream_grpc.devices.detect import DeviceSelection
from hidream_grpc.model.parallel.layout import Layout


@dataclass(frozen=True, slots=True)
class Placement:
    """Ranks of a layout on as many devices."""

    layout: Layout
    devices: DeviceSelection

    @classmethod
    def of(cls, layout: Layout, devices: DeviceSelection, working: Iterable[int]) -> Placement:
        """A layout on the first of the devices that work."""
        return cls(layout, devices.only(tuple(working)[: layout.world_size]))


class GroupPlacement:
    """Where a group is now.

    Args:
        devices: that it may use.
        layout: that was asked for.
        smaller_layouts: what else may be, largest first.
    """

    def __init__(self, devices: DeviceSelection, layout: Layout, smaller_layouts: tuple[Layout, ...]) -> None:
        self._devices = devices
        self._layouts = (layout, *smaller_layouts)
        self._broken: set[int] = set()
        self._now = Placement.of(layout, devices, devices.devices)

    @property
    def now(self) -> Placement:
        """The ranks' layout and devices."""
        return self._now

    @property
    def full_layout(self) -> Layout:
        """That was asked for."""
        return self._layouts[0]

    @property
    def is_full(self) -> bool:
        """Whether the layout is the one that was asked for."""
        return self._now.layout == self.full_layout

    def without(self, ranks: Iterable[int]) -> bool:
        """Pass over the devices of these ranks from now on.

        Returns:
            Whether a layout is left; where none is, all devices count as working again.
        """
        self._broken.update(self._now.devices.devices[rank] for rank in ranks)
        return self._move(self._layouts)

    def smaller(self) -> bool:
        """Take the next smaller layout, whatever the reason; returns as `without` does."""
        return self._move(self._layouts[self._layouts.index(self._now.layout) + 1 :])

    def reset(self) -> None:
        """Take all devices for working, and the layout that was asked for."""
        self._broken.clear()
        self._now = Placement.of(self.full_layout, self._devices, self._devices.devices)

    def _move(self, layouts: tuple[Layout, ...]) -> bool:
        working = [device for device in self._devices.devices if device not in self._broken]
        for layout in layouts:
            if layout.world_size <= len(working):
                self._now = Placement.of(layout, self._devices, working)
                return True
        self.reset()
        return False
