"""Which devices a rank group works on, and in which layout. Pure.

A group starts with the requested layout on the first devices. Devices that fail are skipped; when too few are
left, the best layout for those is used, down to one device.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from hidream_grpc.devices.detect import DeviceSelection
from hidream_grpc.model.parallel.layout import Layout


@dataclass(frozen=True, slots=True)
class Placement:
    """A layout and the devices of its ranks, one each."""

    layout: Layout
    devices: DeviceSelection

    @classmethod
    def of(cls, layout: Layout, devices: DeviceSelection, working: Iterable[int]) -> Placement:
        """Put a layout on the first of the devices that work."""
        return cls(layout, devices.only(tuple(working)[: layout.world_size]))


class GroupPlacement:
    """The current placement of a group, and the devices that have failed.

    Args:
        devices: the devices that the group may use.
        layout: the requested layout.
        smaller_layouts: the layouts to fall back to, the best first.
    """

    def __init__(
        self,
        devices: DeviceSelection,
        layout: Layout,
        smaller_layouts: tuple[Layout, ...],
    ) -> None:
        self._devices = devices
        self._layouts = (layout, *smaller_layouts)
        self._broken: set[int] = set()
        self._now = Placement.of(layout, devices, devices.devices)

    @property
    def now(self) -> Placement:
        """The current layout and devices of the ranks."""
        return self._now

    @property
    def full_layout(self) -> Layout:
        """The requested layout."""
        return self._layouts[0]

    @property
    def has_lost_devices(self) -> bool:
        """Whether any of the devices has failed."""
        return bool(self._broken)

    @property
    def is_full(self) -> bool:
        """Whether the current layout is the requested one."""
        return self._now.layout == self.full_layout

    def without(self, ranks: Iterable[int]) -> bool:
        """Skip the devices of these ranks from now on.

        Returns:
            Whether a layout is left. If none is, all devices count as working again.
        """
        self._broken.update(self._now.devices.devices[rank] for rank in ranks)
        return self._use_first_that_fits(self._layouts)

    def smaller(self) -> bool:
        """Change to the next layout of fewer ranks; return whether there is one, as `without` does."""
        num_ranks = self._now.layout.world_size
        return self._use_first_that_fits(
            tuple(layout for layout in self._later_layouts() if layout.world_size < num_ranks)
        )

    def later(self) -> bool:
        """Change to the next layout, which may need less memory; return whether there is one."""
        return self._use_first_that_fits(self._later_layouts())

    def request(self, layout: Layout) -> None:
        """Request another layout in place of the requested one, from now on."""
        smaller = (other for other in self._layouts[1:] if other.world_size < layout.world_size)
        self._layouts = (layout, *smaller)
        self.reset()

    def reset(self) -> None:
        """Count all devices as working again, and return to the requested layout."""
        self._broken.clear()
        self._now = Placement.of(self.full_layout, self._devices, self._devices.devices)

    def _later_layouts(self) -> tuple[Layout, ...]:
        return self._layouts[self._layouts.index(self._now.layout) + 1 :]

    def _use_first_that_fits(self, layouts: tuple[Layout, ...]) -> bool:
        working = [device for device in self._devices.devices if device not in self._broken]
        for layout in layouts:
            if layout.world_size <= len(working):
                self._now = Placement.of(layout, self._devices, working)
                return True
        self.reset()
        return False
