"""One round of work on one rank: what a `StepPlan` says, in its order.

Every rank holds the state of every request and computes the same updates of it; only the forward of
the transformer is divided. So all ranks must agree at all times about which requests exist: an
admission counts only when it succeeded on every rank, and a request goes only when the plan says so.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from hidream_grpc.devices.base import Device
from hidream_grpc.engine.messages import (
    Admission,
    Decode,
    DecodedImage,
    JobFault,
    PlanDone,
    Preview,
    StepPlan,
)
from hidream_grpc.engine.process_group import all_gather_shares, true_on_every_rank
from hidream_grpc.errors import JobInternalError, OutOfDeviceMemoryError
from hidream_grpc.model.denoising import DenoisingState
from hidream_grpc.model.images import encode_image
from hidream_grpc.model.parallel.layout import sample_share
from hidream_grpc.model.pipeline import HiDreamModel

logger = logging.getLogger(__name__)

PREVIEW_RANK = 0


@dataclass(frozen=True, slots=True)
class _RunningJob:
    admission: Admission
    state: DenoisingState


class Runner:
    """Runs the plans of one generation; starts with no request.

    Args:
        model: on `device`; the same weights on every rank.
        device: of this rank.
        rank, world_size: of this generation's group, which this process has joined.
    """

    def __init__(self, model: HiDreamModel, device: Device, rank: int, world_size: int) -> None:
        self._model = model
        self._device = device
        self._rank = rank
        self._world_size = world_size
        self._jobs: dict[str, _RunningJob] = {}

    def run(self, plan: StepPlan) -> PlanDone:
        """Do this rank's share of a plan.

        Returns:
            What this rank made and how long it took; a job that failed on its own is among `faults`.

        Raises:
            CollectiveError: a rank is gone.
            Exception: what the jobs share failed here; this rank must leave the group, since the
                others wait for it.
        """
        faults: list[JobFault] = []
        for job_id in plan.releases:
            self._jobs.pop(job_id, None)
        encode_seconds = self._admit(plan.admissions, faults)
        stepped = [self._jobs[job_id] for job_id in self._still_there(plan)]
        step_seconds = self._denoise_step(stepped)
        return PlanDone(
            plan_id=plan.plan_id,
            encode_seconds=encode_seconds,
            step_seconds=step_seconds,
            previews=tuple(self._make_previews(stepped, faults)),
            images=tuple(self._decode_images(plan.decodes, faults)),
            faults=tuple(faults),
        )

    def _admit(self, admissions: Sequence[Admission], faults: list[JobFault]) -> float:
        """Start requests; returns the seconds that their prompts took."""
        if not admissions:
            return 0.0
        started = time.monotonic()
        for admission in admissions:
            logger.debug("starting", extra={"job_id": admission.job_id, "request_id": admission.request_id})
            with self._own_work_of(admission, faults):
                self._jobs[admission.job_id] = _RunningJob(admission, self._model.begin(admission.parameters))
        self._device.synchronize()
        encode_seconds = time.monotonic() - started
        succeeded_here = [admission.job_id in self._jobs for admission in admissions]
        succeeded = true_on_every_rank(succeeded_here, self._device.torch_device)
        for admission, is_admitted in zip(admissions, succeeded, strict=True):
            if not is_admitted:
                self._jobs.pop(admission.job_id, None)
        return encode_seconds

    def _still_there(self, plan: StepPlan) -> list[str]:
        """The plan's step jobs but for those whose admission, in this very plan, was refused."""
        refused = {a.job_id for a in plan.admissions if a.job_id not in self._jobs}
        return [job_id for job_id in plan.step_jobs if job_id not in refused]

    def _denoise_step(self, jobs: Sequence[_RunningJob]) -> float:
        """One denoising step of all these requests; returns its seconds, the exchange included."""
        if not jobs:
            return 0.0
        started = time.monotonic()
        states = [job.state for job in jobs]
        batch = self._model.collect(states)
        rows = sample_share(batch.num_samples, self._rank, self._world_size)
        noise_prediction = all_gather_shares(self._model.predict(batch, rows), batch.num_samples)
        self._model.advance(states, batch, noise_prediction)
        self._device.synchronize()
        return time.monotonic() - started

    def _make_previews(self, jobs: Sequence[_RunningJob], faults: list[JobFault]) -> Iterator[Preview]:
        if self._rank != PREVIEW_RANK:
            return
        for job in jobs:
            if job.admission.parameters.with_previews:
                with self._own_work_of(job.admission, faults):
                    yield Preview(job_id=job.admission.job_id, data=self._model.preview(job.state))

    def _decode_images(self, decodes: Sequence[Decode], faults: list[JobFault]) -> Iterator[DecodedImage]:
        for decode in decodes:
            if decode.rank == self._rank:
                job = self._jobs[decode.job_id]
                with self._own_work_of(job.admission, faults):
                    yield self._decode_image(job, decode.image_index)

    def _decode_image(self, job: _RunningJob, image_index: int) -> DecodedImage:
        started = time.monotonic()
        parameters = job.admission.parameters
        pixels = self._model.decode(job.state, image_index)
        data = encode_image(pixels, parameters.output_format, parameters.quality)
        return DecodedImage(
            job_id=job.admission.job_id,
            image_index=image_index,
            data=data,
            decode_seconds=time.monotonic() - started,
        )

    @contextmanager
    def _own_work_of(self, admission: Admission, faults: list[JobFault]) -> Iterator[None]:
        """What fails inside is the fault of this job alone; the group goes on."""
        try:
            yield
        except Exception as error:
            error_id = JobInternalError.new().error_id
            is_out_of_memory = self._device.is_out_of_memory(error)
            logger.exception(
                "job failed",
                extra={
                    "job_id": admission.job_id,
                    "request_id": admission.request_id,
                    "error_id": error_id,
                },
            )
            kind = OutOfDeviceMemoryError if is_out_of_memory else JobInternalError
            faults.append(JobFault(job_id=admission.job_id, kind=kind.__name__, error_id=error_id))
