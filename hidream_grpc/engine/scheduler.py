"""Which requests take the next denoising step. Pure: no clock, no process, no torch."""

from __future__ import annotations

from collections.abc import Container, Iterable
from dataclasses import dataclass, field

from hidream_grpc.engine.protocol.messages import Decode
from hidream_grpc.engine.step_limit import StepLimit
from hidream_grpc.model.parameters import GenerationParameters


@dataclass(frozen=True, slots=True)
class BatchLimits:
    """How much one step may hold.

    Attributes:
        max_running_requests: requests that are denoised or decoded at the same time.
        max_step_pixels: width × height × samples of one forward; a single request may exceed it.
    """

    max_running_requests: int
    max_step_pixels: int


@dataclass(slots=True)
class _Running:
    parameters: GenerationParameters
    # Number of the turn in which the request took its last step.
    last_turn: int
    step: int = 0
    undecoded: set[int] = field(default_factory=set)
    # Image index to the rank that is at it.
    decoding: dict[int, int] = field(default_factory=dict)

    @property
    def size(self) -> tuple[int, int]:
        return self.parameters.width, self.parameters.height

    @property
    def is_denoised(self) -> bool:
        return self.step == self.parameters.num_inference_steps

    @property
    def step_pixels(self) -> int:
        return self.parameters.width * self.parameters.height * self.parameters.num_samples


class StepScheduler:
    """The running requests, and whose turn it is.

    The request that has waited longest for a step goes first and decides the size; all others of
    that size join it, longest waiting first, while the step has room. So sizes take turns, and no
    request waits for another to end.
    """

    def __init__(self, limits: BatchLimits) -> None:
        self._limits = limits
        self._limit = StepLimit(limits.max_step_pixels)
        # Whether the latest `next_step` left out requests for want of room.
        self._is_held_back = False
        self._running: dict[str, _Running] = {}
        self._turn = 0

    def __len__(self) -> int:
        return len(self._running)

    def __contains__(self, claim_id: str) -> bool:
        return claim_id in self._running

    @property
    def has_capacity(self) -> bool:
        """Whether one more request may be admitted."""
        return len(self._running) < self._limits.max_running_requests

    @property
    def max_step_pixels(self) -> int:
        """How much one step may hold now; see `StepLimit`."""
        return self._limit.pixels

    def lower_limit(self, claim_ids: Iterable[str]) -> None:
        """Note that the step of these requests together did not fit the device."""
        step_pixels = sum(
            self._running[claim_id].step_pixels for claim_id in claim_ids if claim_id in self._running
        )
        if step_pixels:
            self._limit.ran_out(step_pixels)

    def lift_limit(self) -> None:
        """Have a step hold what is configured again; a further lack of memory lowers that for longer."""
        self._limit.lift()

    def forget_limit(self) -> None:
        """Have a step hold what is configured again, as if the memory had always been enough."""
        self._limit.forget()

    def admit(
        self,
        claim_id: str,
        parameters: GenerationParameters,
        step: int = 0,
        finished_images: frozenset[int] = frozenset(),
    ) -> None:
        """Add a request that has taken some steps; it takes part in the next step of its size."""
        # Before those that have just taken a step, behind those that wait: newcomers starve nobody.
        last_turn = self._turn - 1
        undecoded = set(range(parameters.num_images)) - finished_images
        self._running[claim_id] = _Running(parameters, last_turn, step, undecoded)

    def release(self, claim_id: str) -> None:
        """Forget a request that ended, or was cancelled; a rank that is at one of its images is free."""
        self._running.pop(claim_id, None)

    def restart(self, claim_id: str, step: int = 0) -> None:
        """Put a request back to a step; images that are decoded stay decoded, others are given up."""
        request = self._running[claim_id]
        request.step = step
        request.last_turn = -1
        request.decoding.clear()

    def next_step(self, ready: Container[str] | None = None) -> tuple[str, ...]:
        """The requests of the next forward: one size, longest waiting first; empty when none is due.

        Args:
            ready: those that may step; None for all.
        """
        waiting = sorted(
            (
                (claim_id, request)
                for claim_id, request in self._running.items()
                if not request.is_denoised and (ready is None or claim_id in ready)
            ),
            key=lambda item: item[1].last_turn,
        )
        if not waiting:
            return ()
        size = waiting[0][1].size
        chosen: list[str] = []
        room = self._limit.pixels
        self._is_held_back = False
        for claim_id, request in waiting:
            if request.size != size:
                continue
            if chosen and request.step_pixels > room:
                self._is_held_back = True
                continue
            chosen.append(claim_id)
            room -= request.step_pixels
        return tuple(chosen)

    def next_decodes(self, world_size: int, ready: Container[str] | None = None) -> tuple[Decode, ...]:
        """New images to decode, oldest request first: one for each rank that is at none.

        Args:
            world_size: ranks of the group.
            ready: requests that may be decoded; None for all.
        """
        busy = {rank for request in self._running.values() for rank in request.decoding.values()}
        free = (rank for rank in range(world_size) if rank not in busy)
        waiting = (
            (claim_id, image_index)
            for claim_id, request in self._running.items()
            if request.is_denoised and (ready is None or claim_id in ready)
            for image_index in sorted(request.undecoded - request.decoding.keys())
        )
        return tuple(
            Decode(claim_id=claim_id, image_index=image_index, rank=rank)
            for rank, (claim_id, image_index) in zip(free, waiting, strict=False)
        )

    @property
    def decoding(self) -> tuple[str, ...]:
        """The requests that ranks are at images of; an image may take several rounds."""
        return tuple(claim_id for claim_id, request in self._running.items() if request.decoding)

    def planned(self, decodes: tuple[Decode, ...]) -> None:
        """Note that these ranks are at these images, until they are decoded."""
        for decode in decodes:
            self._running[decode.claim_id].decoding[decode.image_index] = decode.rank

    def stepped(self, claim_ids: tuple[str, ...]) -> None:
        """Note that these requests took a step in one forward."""
        self._turn += 1
        if claim_ids and self._is_held_back:
            self._limit.held_back()
        for claim_id in claim_ids:
            if claim_id in self._running:
                self._running[claim_id].step += 1
                self._running[claim_id].last_turn = self._turn

    def decoded(self, claim_id: str, image_index: int) -> None:
        """Note that an image is finished."""
        if claim_id in self._running:
            self._running[claim_id].undecoded.discard(image_index)
            self._running[claim_id].decoding.pop(image_index, None)

    def step_of(self, claim_id: str) -> int:
        """Steps that a request has taken."""
        return self._running[claim_id].step

    def progress_of(self, claim_id: str) -> int:
        """A number that grows with every step and every image of a request."""
        request = self._running[claim_id]
        return request.step + request.parameters.num_images - len(request.undecoded)

    def is_finished(self, claim_id: str) -> bool:
        """Whether all images of the request are decoded."""
        return not self._running[claim_id].undecoded
