"""Snapshots of a request in the middle of its denoising."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hidream_grpc.errors import SnapshotError
from hidream_grpc.model.denoising.schedulers import SchedulerHistory
from hidream_grpc.model.denoising.state import DenoisingState
from hidream_grpc.model.snapshot_format import (
    PackedSnapshot,
    PackedTensor,
    SnapshotIdentity,
    pack,
    unpack,
)


@dataclass(frozen=True, slots=True)
class StateSnapshot:
    """The parts of a state that `HiDreamModel.advance` changes; later steps do not change a snapshot.

    It refers to the state's tensors, which no step writes to, so taking one costs microseconds. It does not
    hold the prompts, which are encoded again or still cached.

    Attributes:
        step: number of denoising steps done.
        latents: (N, C, H, W), model dtype.
        history: history of the request's scheduler.
        generator_states: one per image, uint8.
    """

    step: int
    latents: Tensor
    history: SchedulerHistory
    generator_states: tuple[Tensor, ...]

    @classmethod
    def of(cls, state: DenoisingState) -> StateSnapshot:
        """Take a snapshot of the state as it is now."""
        return cls(
            step=state.step,
            latents=state.latents,
            history=SchedulerHistory.of(state.scheduler),
            generator_states=tuple(generator.get_state() for generator in state.generators),
        )

    def put_into(self, state: DenoisingState) -> None:
        """Bring a state of the same request to this snapshot; later steps give the same bits as after it.

        Raises:
            SnapshotError: the state is not of the same request.
        """
        if self.latents.shape != state.latents.shape or self.latents.dtype != state.latents.dtype:
            here, there = (f"{tuple(t.shape)} of {t.dtype}" for t in (state.latents, self.latents))
            raise SnapshotError(f"the latents of the snapshot are {there}, not {here}")
        if not self.latents.isfinite().all():
            raise SnapshotError("the latents of the snapshot are not finite")
        self.history.put_into(state.scheduler, self.step)
        for generator, generator_state in zip(state.generators, self.generator_states, strict=True):
            try:
                generator.set_state(generator_state)
            except (RuntimeError, TypeError) as error:
                raise SnapshotError("the snapshot is of another version of torch's generator") from error
        state.latents = self.latents
        state.step = self.step

    def to_bytes(self, identity: SnapshotIdentity) -> bytes:
        """Pack a snapshot of this request, on any device, into bytes; wait for the device."""
        return pack(
            PackedSnapshot(
                step=self.step,
                latents=_pack(self.latents),
                generator_states=tuple(state.numpy().tobytes() for state in self.generator_states),
                scheduler_name=self.history.scheduler_name,
                model_outputs=tuple(
                    None if output is None else _pack(output) for output in self.history.model_outputs
                ),
                last_sample=None if self.history.last_sample is None else _pack(self.history.last_sample),
                lower_order_nums=self.history.lower_order_nums,
                this_order=self.history.this_order,
            ),
            identity,
        )

    @classmethod
    def from_bytes(cls, data: bytes, identity: SnapshotIdentity, device: torch.device) -> StateSnapshot:
        """Read the bytes that `to_bytes` returned for the same request, onto this device.

        Raises:
            SnapshotError: the bytes are no whole snapshot of that request.
        """
        packed = unpack(data, identity)
        return cls(
            step=packed.step,
            latents=_unpack(packed.latents, device),
            history=SchedulerHistory(
                scheduler_name=packed.scheduler_name,
                model_outputs=tuple(
                    None if output is None else _unpack(output, device) for output in packed.model_outputs
                ),
                last_sample=None if packed.last_sample is None else _unpack(packed.last_sample, device),
                lower_order_nums=packed.lower_order_nums,
                this_order=packed.this_order,
            ),
            generator_states=tuple(
                torch.frombuffer(bytearray(state), dtype=torch.uint8) for state in packed.generator_states
            ),
        )


def _pack(tensor: Tensor) -> PackedTensor:
    values = tensor.detach().cpu().contiguous()
    # As bytes, since numpy has no bfloat16.
    data = values.view(-1).view(torch.uint8).numpy().tobytes()
    return PackedTensor(str(values.dtype).removeprefix("torch."), tuple(values.shape), data)


def _unpack(packed: PackedTensor, device: torch.device) -> Tensor:
    dtype: torch.dtype = getattr(torch, packed.dtype)
    return torch.frombuffer(bytearray(packed.data), dtype=dtype).view(packed.shape).to(device)
