"""Which layout is the best for some devices, by what is counted of each."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass

from hidream_grpc.devices.device_types import DeviceMemory, DeviceSpeed
from hidream_grpc.model.checkpoint.step_shapes import StepShape
from hidream_grpc.model.memory_requirements import MemoryRequirements
from hidream_grpc.model.parallel.layout import Layout
from hidream_grpc.model.parallel.planner import LayoutWord, allowed_layouts


@dataclass(frozen=True, slots=True)
class RatedLayout:
    """A layout with what it is chosen by.

    Attributes:
        layout: the layout.
        image_seconds: time of a step of one image: what a single caller waits for.
        images_per_second: steps of images in a second, where many callers fill the steps.
        needed_bytes: the least memory of a rank, text encoders apart.
    """

    layout: Layout
    image_seconds: float
    images_per_second: float
    needed_bytes: int

    def is_beaten_by(self, other: RatedLayout) -> bool:
        """Whether another layout is as good in everything and better in something."""
        pairs = zip(other.costs, self.costs, strict=True)
        return other.costs != self.costs and all(its <= mine for its, mine in pairs)

    @property
    def costs(self) -> tuple[float, ...]:
        """What is better where it is less."""
        return (
            self.image_seconds,
            -self.images_per_second,
            self.layout.world_size,
            self.needed_bytes,
        )


def by_latency(rated: RatedLayout) -> tuple[float, ...]:
    """Order of layouts for a single caller, the best first."""
    return (round(rated.image_seconds, 9), -rated.images_per_second, *_simplicity(rated))


def by_throughput(rated: RatedLayout) -> tuple[float, ...]:
    """Order of layouts for many callers, the best first."""
    return (-round(rated.images_per_second, 9), rated.image_seconds, *_simplicity(rated))


def _simplicity(rated: RatedLayout) -> tuple[float, ...]:
    return rated.layout.world_size, rated.needed_bytes, rated.layout.data_parallel


def unbeaten(rated: Iterable[RatedLayout]) -> Iterator[RatedLayout]:
    """Yield the layouts that no other one beats in time, throughput, number of devices and memory at once."""
    left: list[RatedLayout] = []
    # What beats another one comes before it, and is left or beaten by one that is.
    for one in sorted(rated, key=lambda each: (each.costs, each.layout.data_parallel)):
        if not any(one.costs == other.costs or one.is_beaten_by(other) for other in left):
            left.append(one)
            yield one


Order = Callable[[RatedLayout], tuple[float, ...]]
"""The key by which layouts are sorted, the best first."""

ORDERS: Mapping[LayoutWord, Order] = {
    LayoutWord.AUTO: by_latency,
    LayoutWord.THROUGHPUT: by_throughput,
}
"""The key by which a word chooses."""


@dataclass(frozen=True, slots=True)
class LayoutChooser:
    """Chooses layouts of one model for devices of one type.

    Attributes:
        requirements: what its ranks need.
        speed: how fast the devices compute, and send to each other.
    """

    requirements: MemoryRequirements
    speed: DeviceSpeed

    def rate(self, layout: Layout) -> RatedLayout:
        """Count what a layout is chosen by."""
        costs, workload = self.requirements.costs, self.requirements.workload
        images_of_full_step = workload.full.num_samples / workload.image.num_samples
        return RatedLayout(
            layout=layout,
            image_seconds=costs.step_seconds(layout, workload.image, self.speed),
            images_per_second=images_of_full_step / costs.step_seconds(layout, workload.full, self.speed),
            needed_bytes=costs.weights_bytes(layout) + costs.work_bytes(layout, workload.least).total_bytes,
        )

    def rated(self, num_devices: int) -> tuple[RatedLayout, ...]:
        """Every layout that the model allows on at most so many devices."""
        most = Layout(cfg_parallel=2, sequence_parallel=num_devices, data_parallel=num_devices)
        layouts = allowed_layouts(num_devices, self.requirements.costs.divisions, most)
        return tuple(map(self.rate, layouts))

    def best(
        self, rated: Iterable[RatedLayout], word: LayoutWord, device: DeviceMemory, host: DeviceMemory
    ) -> RatedLayout | None:
        """The best layout with room for the steps that it is chosen for, or else for the least work.

        Args:
            rated: the layouts to choose from.
            word: AUTO or THROUGHPUT.
            device: memory of each device.
            host: memory of the host.

        Returns:
            None where no layout has room.
        """
        ordered = sorted(rated, key=ORDERS[word])
        for step in (self._wanted_step(word), self.requirements.workload.least):
            for one in ordered:
                if self.requirements.fits(one.layout, device, host, step):
                    return one
        return None

    def needed_bytes(self, layout: Layout, word: LayoutWord) -> int:
        """Memory of a device, text encoders apart, with which a layout has room for what the word wants."""
        costs = self.requirements.costs
        return costs.weights_bytes(layout) + costs.work_bytes(layout, self._wanted_step(word)).total_bytes

    def _wanted_step(self, word: LayoutWord) -> StepShape:
        workload = self.requirements.workload
        return workload.image if word is LayoutWord.AUTO else workload.full

    def best_or_leanest(
        self, rated: Collection[RatedLayout], word: LayoutWord, device: DeviceMemory, host: DeviceMemory
    ) -> RatedLayout:
        """What `best` chooses; where nothing has room, the one that needs least."""
        best = self.best(rated, word, device, host)
        return min(rated, key=lambda one: one.needed_bytes) if best is None else best

    def instead_of(
        self,
        rated: Collection[RatedLayout],
        word: LayoutWord,
        layout: Layout,
        device: DeviceMemory,
        host: DeviceMemory,
    ) -> Layout:
        """The layout to take where one was begun with before the memory of its devices was known.

        Args:
            rated: the layouts to choose from.
            word: AUTO or THROUGHPUT.
            layout: the one that was begun with, or taken instead before; among the rated.
            device: memory of each device.
            host: memory of the host.

        Returns:
            That layout, or one that comes after it in the order of the word: so to ask again ends.
        """
        order = ORDERS[word]
        begun = next(order(one) for one in rated if one.layout == layout)
        left = [one for one in rated if order(one) >= begun]
        return self.best_or_leanest(left, word, device, host).layout

    def after_a_loss(self, num_devices: int, word: LayoutWord | None) -> tuple[Layout, ...]:
        """The layouts to fall back to when so many devices are left at most, the best first.

        They are those that no other one beats, one for a single device among them: a slower one needs
        fewer devices or less memory.
        """
        order = by_throughput if word is LayoutWord.THROUGHPUT else by_latency
        rated = unbeaten(self.rated(num_devices)) if num_devices else ()
        return tuple(one.layout for one in sorted(rated, key=order))
