"""Runs a rank's share of a `StepPlan`, in the order of the plan.

Every rank holds the state of every request and computes the same updates of it; only the forward of the
transformer is divided. So all ranks must agree at all times on which requests exist: an admission counts only
if it succeeded on every rank, and a request is forgotten only when the plan says so.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from hidream_grpc.devices.device import Device
from hidream_grpc.engine.protocol.messages import (
    Admission,
    Decode,
    DecodedImage,
    JobFault,
    PlanDone,
    Preview,
    StepPlan,
    StepSnapshot,
)
from hidream_grpc.engine.rank.decoding import RunningDecode
from hidream_grpc.errors import JobInternalError, NonFiniteError, OutOfDeviceMemoryError, SnapshotError
from hidream_grpc.model.denoising.snapshots import StateSnapshot
from hidream_grpc.model.denoising.state import DenoisingState, StepBatch, have_finite_latents
from hidream_grpc.model.image_metadata import ImageMetadata
from hidream_grpc.model.parallel.groups import Axis
from hidream_grpc.model.pipeline import HiDreamModel
from hidream_grpc.model.prompts.encoding import EncodedPrompts

logger = logging.getLogger(__name__)

PREVIEW_RANK = 0
SNAPSHOT_RANK = 0


@dataclass(slots=True)
class _Request:
    """A request of which this rank holds the state."""

    admission: Admission
    state: DenoisingState
    # The state before its latest step, which counts only once every rank has finished it.
    before: StateSnapshot | None = None

    def after_step(self, step: int) -> StateSnapshot | None:
        """The request as it was after a step; None where that is not known any more."""
        # This one first: a step that failed half-way left the state between two steps.
        if self.before is not None and self.before.step == step:
            return self.before
        return StateSnapshot.of(self.state) if self.state.step == step else None


@dataclass(frozen=True, slots=True)
class _EncodingSummary:
    """What the prompts of one plan took to encode."""

    encode_seconds: float = 0.0
    num_prompt_cache_hits: int = 0
    num_prompt_cache_misses: int = 0


class Runner:
    """Runs the plans of one generation, which begins without any request.

    Args:
        model: this rank's share of the model, on `device`.
        device: device of this rank.
        world: all ranks of this generation's group, which this process has joined.
        image_metadata: what the files of images say of themselves.
    """

    def __init__(
        self, model: HiDreamModel, device: Device, world: Axis, image_metadata: ImageMetadata
    ) -> None:
        self._model = model
        self._device = device
        self._world = world
        self._image_metadata = image_metadata
        self._requests: dict[str, _Request] = {}
        self._decoding: RunningDecode | None = None

    def run(self, plan: StepPlan) -> PlanDone:
        """Run this rank's share of a plan.

        Returns:
            The results of this rank and its times; a request that failed on its own is among `faults`.

        Raises:
            CollectiveError: a rank is gone.
            Exception: work shared by all requests failed here; this rank must leave the group, since the
                others wait for it.
        """
        faults: list[JobFault] = []
        self._release(plan.releases)
        admitted = self._admit(plan.admissions, faults)
        # A plan steps no other request that is missing: these were refused within this plan.
        refused = {admission.claim_id for admission in plan.admissions} - self._requests.keys()
        stepped = [self._requests[claim_id] for claim_id in plan.step_claims if claim_id not in refused]
        step_seconds = self._denoise_step(stepped, faults)
        failed = {fault.claim_id for fault in faults}
        stepped = [request for request in stepped if request.admission.claim_id not in failed]
        return PlanDone(
            plan_id=plan.plan_id,
            encode_seconds=admitted.encode_seconds,
            step_seconds=step_seconds,
            num_prompt_cache_hits=admitted.num_prompt_cache_hits,
            num_prompt_cache_misses=admitted.num_prompt_cache_misses,
            previews=tuple(self._make_previews(stepped, faults)),
            snapshot=next(self._take_snapshot(plan, stepped, faults), None),
            images=self._decode(plan, refused, faults),
            faults=tuple(faults),
        )

    def give_up(self) -> None:
        """Stop decoding, since the group is lost: from now on only `snapshot` is called."""
        self._decoding = None

    def snapshot(self, claim_id: str, step: int) -> bytes:
        """The packed snapshot of a request after a step; empty where this rank cannot give it."""
        if (request := self._requests.get(claim_id)) is None:
            return b""
        try:
            snapshot = request.after_step(step)
            return self._model.pack_snapshot(snapshot, request.admission.parameters) if snapshot else b""
        except Exception:
            # The device may have failed with the plan; another rank, or an older snapshot, takes its place.
            logger.exception("cannot give a snapshot", extra=request.admission.log_fields)
            return b""

    def _release(self, claim_ids: Sequence[str]) -> None:
        """Forget requests, and the image that this rank decodes if it is one of theirs."""
        for claim_id in claim_ids:
            self._requests.pop(claim_id, None)
        if self._decoding is not None and self._decoding.admission.claim_id in claim_ids:
            self._decoding = None

    def _admit(self, admissions: Sequence[Admission], faults: list[JobFault]) -> _EncodingSummary:
        """Encode the prompts of all these requests, together with the other ranks, and start each request."""
        if not admissions:
            return _EncodingSummary()
        started = time.monotonic()
        encoded = self._model.encode([prompt for a in admissions for prompt in a.parameters.prompts])
        for admission in admissions:
            logger.debug("starting", extra=admission.log_fields)
            with self._own_work_of(admission, faults):
                # A failure on another rank is reported by that rank.
                if encoded.has_all_of(admission.parameters.prompts):
                    state = self._begin(admission, encoded)
                    self._requests[admission.claim_id] = _Request(admission, state)
        self._device.synchronize()
        encode_seconds = time.monotonic() - started
        succeeded_here = [admission.claim_id in self._requests for admission in admissions]
        succeeded = self._world.all_true(succeeded_here, self._device.torch_device)
        for admission, is_admitted in zip(admissions, succeeded, strict=True):
            if not is_admitted:
                self._requests.pop(admission.claim_id, None)
        return _EncodingSummary(encode_seconds, encoded.num_cache_hits, encoded.num_cache_misses)

    def _begin(self, admission: Admission, encoded: EncodedPrompts) -> DenoisingState:
        if admission.snapshot:
            return self._model.restore(admission.parameters, admission.snapshot, encoded)
        return self._model.begin(admission.parameters, encoded)

    def _denoise_step(self, requests: Sequence[_Request], faults: list[JobFault]) -> float:
        """Run one denoising step of all these requests; return its seconds, collectives included.

        A request whose latents are not finite then gets a fault, before anything is made of them.
        """
        if not requests:
            return 0.0
        started = time.monotonic()
        for request in requests:
            request.before = StateSnapshot.of(request.state)
        states = [request.state for request in requests]
        batch = StepBatch.collect(states)
        self._model.advance(states, batch, self._model.predict(batch))
        are_finite = have_finite_latents(states)
        self._device.synchronize()
        step_seconds = time.monotonic() - started
        for request, is_finite in zip(requests, are_finite, strict=True):
            if not is_finite:
                faults.append(self._not_finite(request.admission, "its latents are not finite"))
        return step_seconds

    def _make_previews(self, requests: Sequence[_Request], faults: list[JobFault]) -> Iterator[Preview]:
        if self._world.index != PREVIEW_RANK:
            return
        for request in requests:
            if request.admission.parameters.with_previews:
                with self._own_work_of(request.admission, faults):
                    yield Preview(
                        claim_id=request.admission.claim_id, data=self._model.preview(request.state)
                    )

    def _take_snapshot(
        self, plan: StepPlan, requests: Sequence[_Request], faults: list[JobFault]
    ) -> Iterator[StepSnapshot]:
        request = next(
            (request for request in requests if request.admission.claim_id == plan.snapshot_claim), None
        )
        if request is None or self._world.index != SNAPSHOT_RANK:
            return
        started = time.monotonic()
        with self._own_work_of(request.admission, faults):
            snapshot = StateSnapshot.of(request.state)
            yield StepSnapshot(
                claim_id=request.admission.claim_id,
                step=request.state.step,
                data=self._model.pack_snapshot(snapshot, request.admission.parameters),
                snapshot_seconds=time.monotonic() - started,
            )

    def _decode(self, plan: StepPlan, refused: set[str], faults: list[JobFault]) -> tuple[DecodedImage, ...]:
        """Continue the image that this rank decodes, within the budget of the plan."""
        for decode in plan.decodes:
            if decode.rank == self._world.index and decode.claim_id not in refused:
                self._start_decoding(decode, faults)
        current, self._decoding = self._decoding, None
        if current is None:
            return ()
        with self._own_work_of(current.admission, faults):
            image = current.advance(plan.decode_budget_seconds, waits_for_file=not plan.step_claims)
            if image is not None:
                return (image,)
            self._decoding = current
        return ()

    def _start_decoding(self, decode: Decode, faults: list[JobFault]) -> None:
        if self._decoding is not None:
            raise ValueError("a rank decodes one image at a time")
        request = self._requests[decode.claim_id]
        with self._own_work_of(request.admission, faults):
            decoding = self._model.start_decoding(request.state, decode.image_index)
            self._decoding = RunningDecode(
                request.admission, decode.image_index, decoding, self._device, self._image_metadata
            )

    @contextmanager
    def _own_work_of(self, admission: Admission, faults: list[JobFault]) -> Iterator[None]:
        """Record any failure inside the block as a fault of this request alone; the group goes on."""
        try:
            yield
        except SnapshotError as error:
            faults.append(
                JobFault(
                    claim_id=admission.claim_id, kind=SnapshotError.__name__, error_id="", reason=str(error)
                )
            )
        except NonFiniteError as error:
            faults.append(self._not_finite(admission, str(error)))
        except Exception as error:
            error_id = JobInternalError.new().error_id
            is_out_of_memory = self._device.is_out_of_memory(error)
            logger.exception("job failed", extra=admission.log_fields | {"error_id": error_id})
            kind = OutOfDeviceMemoryError if is_out_of_memory else JobInternalError
            faults.append(JobFault(claim_id=admission.claim_id, kind=kind.__name__, error_id=error_id))

    def _not_finite(self, admission: Admission, what: str) -> JobFault:
        """The fault of a request whose numbers are not finite; every rank reports the same one."""
        request = self._requests.get(admission.claim_id)
        step, parameters = request.state.step if request else 0, admission.parameters
        where = f"step {step} of {parameters.num_inference_steps}, seed {parameters.seed}"
        return JobFault(
            claim_id=admission.claim_id,
            kind=NonFiniteError.__name__,
            error_id="",
            reason=f"{what} ({where})",
        )
