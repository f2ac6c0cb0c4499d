"""Every error of the service.

    HiDreamError
    ├── StartupError                    one line on the terminal, exit code 2, nothing loaded
    │   ├── ConfigurationError          a flag or variable is out of its range
    │   ├── AddressInUseError           another process listens there
    │   ├── ModelNotFoundError          a model folder is missing or incomplete
    │   ├── CheckpointChangedError      other files lie in the model folder than at the start of the server
    │   ├── DeviceUnavailableError      the device type or one of the devices is not there
    │   ├── DeviceFailedError           devices cannot be opened; the engine takes the others, while there are
    │   ├── InsufficientMemoryError     the model in this layout needs more memory than there is
    │   ├── StoreInUseError             another server has the job store open
    │   ├── StoreUnusableError          a file, right, role or host of the job store is not as it must be
    │   └── StoreVersionError           a newer server has written the job store
    ├── RequestError                    the caller is told; the table is `server/status.py`
    │   ├── UnauthenticatedError        a token or a name in a certificate is asked for, and missing
    │   ├── InvalidRequestError         one or more fields, all named
    │   ├── RequestIdConflictError      the request id was used with another request
    │   ├── JobNotFoundError            no such job, or it is another's
    │   ├── JobNotEndedError            only a job that has ended can be deleted
    │   ├── QueueFullError              nothing was accepted
    │   ├── CallerQueueFullError        nothing was accepted: as many of the caller's jobs wait as may
    │   ├── CallerQuotaError            nothing was accepted: the caller's work of this minute is used up
    │   ├── StoreUnavailableError       the database of the jobs does not answer
    │   ├── StoreFullError              the database of the jobs has no room
    │   ├── TooManyReadersError         too many streams are open, of all callers together
    │   ├── CallerStreamLimitError      the caller has too many streams open
    │   ├── ModelNotServedError         nothing was accepted: no live server serves the model asked for
    │   ├── NotServingError             starting, draining, or the devices are lost
    │   ├── ArtifactUnavailableError    images cannot be stored or read now
    │   ├── ImageNotFoundError          the job has no such image, or has it no longer
    │   ├── ImageNotFinishedError       the job is still at the image
    │   ├── ImageDamagedError           the stored image is gone, short or altered
    │   ├── OffsetOutOfRangeError       beyond the image's size
    │   ├── TooBusyForDeadlineError     nothing was accepted: behind others it would end too late
    │   ├── DeadlineTooShortError       nothing was accepted: even alone it would end too late
    │   ├── DeadlineExceededError       the caller's deadline passed before the job ended
    │   └── JobCancelledError           somebody cancelled the job
    ├── JobError                        a job that was accepted failed; the same table
    │   ├── StorageFullError            no room for the images
    │   ├── OutOfDeviceMemoryError      too large for the device, even alone
    │   └── JobInternalError            our fault; the log has the error id
    ├── RankDiedError                   the rank group was lost; the engine recovers, no caller sees it
    │   └── RestartRequestedError       the ranks are to start anew; nothing is lost yet
    ├── SnapshotError                   damaged or another's; its request starts from its seed
    ├── NonFiniteError                  numbers of one job are NaN or infinite; it fails as a JobInternalError
    └── ClaimLostError                  the job is another replica's by now, or has ended; no caller sees it

Facts are attributes, so that what handles an error never reads its text.
"""

from __future__ import annotations

import uuid
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path


class HiDreamError(Exception):
    """Base of every error that this service raises on purpose."""


class StartupError(HiDreamError):
    """The service cannot start as asked; its text is the one line that the operator reads."""


class ConfigurationError(StartupError):
    """A flag, environment variable or configuration value is unknown or out of range."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(f"{name}: {reason}")
        self.name = name
        self.reason = reason


class AddressInUseError(StartupError):
    """Another process already listens on the address."""

    def __init__(self, flag: str, address: str) -> None:
        super().__init__(f"{flag}: {address} is already in use by another process")
        self.flag = flag
        self.address = address


class ModelNotFoundError(StartupError):
    """A model folder is missing, or lacks a part."""

    def __init__(self, flag: str, path: Path, reason: str = "no such folder") -> None:
        super().__init__(f"{flag}: {path}: {reason}")
        self.flag = flag
        self.path = path
        self.reason = reason


class CheckpointChangedError(StartupError):
    """The files of the checkpoint are not those that the server described when it started."""

    def __init__(self, model_path: Path) -> None:
        super().__init__(
            f"the checkpoint in {model_path} has changed since the server started: "
            "put its files back, or restart the server to serve the new ones"
        )
        self.model_path = model_path


class DeviceUnavailableError(StartupError):
    """The device type, or one of the devices asked for, is not on this machine."""

    def __init__(self, flag: str, reason: str) -> None:
        super().__init__(f"{flag}: {reason}")
        self.flag = flag
        self.reason = reason


class DeviceFailedError(StartupError):
    """The devices of these ranks cannot be opened, or not loaded onto; others may work.

    took_too_long says that trying again would take as long again.
    """

    def __init__(self, ranks: tuple[int, ...], reason: str, *, took_too_long: bool = False) -> None:
        super().__init__(reason)
        self.ranks = ranks
        self.reason = reason
        self.took_too_long = took_too_long


class InsufficientMemoryError(StartupError):
    """What the ranks load does not fit the memory that there is; no device is to blame.

    fits_total says that it would if nothing else held any: a killed process may still give some back.
    """

    def __init__(self, reason: str, *, fits_total: bool = False) -> None:
        super().__init__(reason)
        self.fits_total = fits_total


class StoreInUseError(StartupError):
    """Another server has the file of the job store open."""

    def __init__(self, path: Path) -> None:
        super().__init__(f"{path} is in use by another server")
        self.path = path


class StoreUnusableError(StartupError):
    """The job store cannot be opened; its text says which file, right, role or host is in the way."""


class StoreVersionError(StartupError):
    """The job store was written by a newer version of this service."""

    def __init__(self, store: str) -> None:
        super().__init__(f"{store} was written by a newer version of this service")
        self.store = store


class RequestError(HiDreamError):
    """The caller asked for something that it cannot have (now, or at all)."""


class UnauthenticatedError(RequestError):
    """The caller gave no bearer token or name that is known; reason is a word for programs."""

    def __init__(self, reason: str, description: str) -> None:
        super().__init__(description)
        self.reason = reason


@dataclass(frozen=True, slots=True)
class FieldViolation:
    """One bad field: its path in the request, and what would be accepted."""

    field: str
    description: str


class InvalidRequestError(RequestError):
    """One or more fields of the request are not acceptable; every one of them is listed."""

    def __init__(self, violations: tuple[FieldViolation, ...]) -> None:
        super().__init__("; ".join(f"{v.field}: {v.description}" for v in violations))
        self.violations = violations


class RequestIdConflictError(RequestError):
    """A job with this request id exists, and asks for something else."""

    def __init__(self, request_id: str, job_id: str) -> None:
        super().__init__(f"request_id {request_id} was used with another request: job {job_id}")
        self.request_id = request_id
        self.job_id = job_id


class JobNotFoundError(RequestError):
    """No such job, or it belongs to another caller."""

    def __init__(self, job_id: str) -> None:
        super().__init__(f"no job {job_id}")
        self.job_id = job_id


class JobNotEndedError(RequestError):
    """The job is queued or running, and must not be."""

    def __init__(self, job_id: str) -> None:
        super().__init__(f"job {job_id} has not ended; cancel it first")
        self.job_id = job_id


class QueueFullError(RequestError):
    """The queue holds as many jobs as it may; nothing was accepted."""

    def __init__(self, max_queued_jobs: int, retry_after_seconds: float) -> None:
        super().__init__(f"the queue is full: max_queued_jobs is {max_queued_jobs}")
        self.max_queued_jobs = max_queued_jobs
        self.retry_after_seconds = retry_after_seconds


class CallerQueueFullError(RequestError):
    """As many jobs of this caller wait as may; nothing was accepted."""

    def __init__(self, caller: str, max_queued_jobs_per_caller: int, retry_after_seconds: float) -> None:
        super().__init__(
            f"too many of your jobs wait: max_queued_jobs_per_caller is {max_queued_jobs_per_caller}"
        )
        self.caller = caller
        self.max_queued_jobs_per_caller = max_queued_jobs_per_caller
        self.retry_after_seconds = retry_after_seconds


class CallerQuotaError(RequestError):
    """This caller asks for more work within a minute than it may; nothing was accepted."""

    def __init__(
        self,
        caller: str,
        pixel_steps: int,
        max_pixel_steps_per_minute_per_caller: int,
        retry_after_seconds: float,
    ) -> None:
        super().__init__(
            f"width × height × num_inference_steps × num_images is {pixel_steps}, more than is left of "
            f"max_pixel_steps_per_minute_per_caller, which is {max_pixel_steps_per_minute_per_caller}"
        )
        self.caller = caller
        self.pixel_steps = pixel_steps
        self.max_pixel_steps_per_minute_per_caller = max_pixel_steps_per_minute_per_caller
        self.retry_after_seconds = retry_after_seconds


class StoreUnavailableError(RequestError):
    """The database of the jobs does not answer; whether the change was made is not known."""

    def __init__(self, retry_after_seconds: float) -> None:
        super().__init__("the job store does not answer")
        self.retry_after_seconds = retry_after_seconds


class StoreFullError(RequestError):
    """The database of the jobs has no room; nothing was changed."""

    def __init__(self, retry_after_seconds: float) -> None:
        super().__init__("the job store has no room")
        self.retry_after_seconds = retry_after_seconds


class TooManyReadersError(RequestError):
    """As many streams as the service allows are open."""

    def __init__(self, max_streams: int, retry_after_seconds: float) -> None:
        super().__init__(f"too many open streams: max_streams is {max_streams}")
        self.max_streams = max_streams
        self.retry_after_seconds = retry_after_seconds


class CallerStreamLimitError(RequestError):
    """As many streams of this caller as it may have are open."""

    def __init__(self, caller: str, max_streams_per_caller: int, retry_after_seconds: float) -> None:
        super().__init__(
            f"too many of your streams are open: max_streams_per_caller is {max_streams_per_caller}"
        )
        self.caller = caller
        self.max_streams_per_caller = max_streams_per_caller
        self.retry_after_seconds = retry_after_seconds


class ModelNotServedError(RequestError):
    """No live server of the job store draws with the model asked for; nothing was accepted."""

    def __init__(self, model: str, live_models: tuple[str, ...]) -> None:
        named = ", ".join(live_models) or "none"
        super().__init__(f"no live server serves the model {model!r}; live models: {named}")
        self.model = model
        self.live_models = live_models


class NotServingError(RequestError):
    """The service is starting or draining, or its devices are lost."""

    def __init__(self, reason: str, retry_after_seconds: float) -> None:
        super().__init__(reason)
        self.reason = reason
        self.retry_after_seconds = retry_after_seconds


class ArtifactUnavailableError(RequestError):
    """The artifact store does not answer, or refuses us.

    The reason is for the operator: it may name hosts and folders, and is no part of the text.
    """

    def __init__(self, retry_after_seconds: float, reason: str) -> None:
        super().__init__("the artifact store is not available")
        self.reason = reason
        self.retry_after_seconds = retry_after_seconds


class ImageNotFoundError(RequestError):
    """The artifact store does not have the image."""

    def __init__(self, job_id: str, index: int) -> None:
        super().__init__(f"image {index} of job {job_id} is not there")
        self.job_id = job_id
        self.index = index


class ImageNotFinishedError(RequestError):
    """The job is still at the image."""

    def __init__(self, job_id: str, index: int) -> None:
        super().__init__(f"image {index} of job {job_id} is not finished; watch the job")
        self.job_id = job_id
        self.index = index


class ImageDamagedError(RequestError):
    """An image that was stored is gone, short or altered; what was read of it must not be used."""

    def __init__(self, job_id: str, index: int) -> None:
        super().__init__(f"image {index} of job {job_id} is damaged; ask for it again with the same seed")
        self.job_id = job_id
        self.index = index


class OffsetOutOfRangeError(RequestError):
    """The offset lies beyond the image's size."""

    def __init__(self, offset: int, size_bytes: int) -> None:
        super().__init__(f"offset must be 0 to {size_bytes}, is {offset}")
        self.offset = offset
        self.size_bytes = size_bytes


class TooBusyForDeadlineError(RequestError):
    """Behind the jobs that are there a request would not end before its deadline; nothing was accepted."""

    def __init__(self, deadline_seconds: float, earliest_seconds: float, retry_after_seconds: float) -> None:
        super().__init__(
            f"too many jobs are in front: the images would come in {earliest_seconds:.1f} s at the earliest, "
            f"and the deadline is in {deadline_seconds:.1f} s"
        )
        self.deadline_seconds = deadline_seconds
        self.earliest_seconds = earliest_seconds
        self.retry_after_seconds = retry_after_seconds


class DeadlineTooShortError(RequestError):
    """Even without other jobs a request would not end before its deadline; nothing was accepted."""

    def __init__(self, deadline_seconds: float, earliest_seconds: float) -> None:
        super().__init__(
            f"the images take at least {earliest_seconds:.1f} s, "
            f"and the deadline is in {deadline_seconds:.1f} s"
        )
        self.deadline_seconds = deadline_seconds
        self.earliest_seconds = earliest_seconds


class DeadlineExceededError(RequestError):
    """The caller's deadline passed before its job ended; the job was stopped."""

    def __init__(self, job_id: str) -> None:
        super().__init__(f"the deadline passed before job {job_id} ended")
        self.job_id = job_id


class JobCancelledError(RequestError):
    """The job was cancelled before it ended."""

    def __init__(self, job_id: str) -> None:
        super().__init__(f"job {job_id} was cancelled")
        self.job_id = job_id


class JobError(HiDreamError):
    """A job that was accepted cannot be finished."""


class StorageFullError(JobError):
    """The artifact store has no room for the images."""

    def __init__(self, job_id: str, size_bytes: int) -> None:
        super().__init__(f"no room to store {size_bytes} bytes of job {job_id}")
        self.job_id = job_id
        self.size_bytes = size_bytes


class OutOfDeviceMemoryError(JobError):
    """The job does not fit the device's memory."""

    def __init__(self, job_id: str) -> None:
        super().__init__(f"job {job_id} does not fit the memory of the device")
        self.job_id = job_id


class JobInternalError(JobError):
    """A failure of ours; the log line with the same error id says what it was."""

    def __init__(self, error_id: str) -> None:
        super().__init__(f"internal error {error_id}")
        self.error_id = error_id

    @classmethod
    def new(cls) -> JobInternalError:
        """An error with an id of its own."""
        return cls(uuid.uuid4().hex)


class LossCause(StrEnum):
    """What broke a rank group; whether the work that it was at may have done it."""

    OUTSIDE = "outside"
    """Somebody killed or stopped a process, or a connection was lost: no job can be blamed."""
    FAULT = "fault"
    """A rank crashed, ended, raised an error or hung at its work."""
    OUT_OF_MEMORY = "out of memory"
    """The work did not fit the memory of a device, or the kernel killed a rank for its memory."""


class RankDiedError(HiDreamError):
    """The rank group was lost while it worked; ranks names who died or hung, cause whether of its work."""

    def __init__(self, ranks: tuple[int, ...], reason: str, cause: LossCause = LossCause.OUTSIDE) -> None:
        super().__init__(f"rank {', '.join(map(str, ranks))}: {reason}" if ranks else reason)
        self.ranks = ranks
        self.reason = reason
        self.cause = cause


class RestartRequestedError(RankDiedError):
    """The operator wants the ranks on all devices again; they work, and know their requests until then."""

    def __init__(self) -> None:
        super().__init__((), "the operator asked for all devices")


class SnapshotError(HiDreamError):
    """A snapshot is not whole, or not of the request and checkpoint that it is read for."""


class NonFiniteError(HiDreamError):
    """What a model computed holds NaN or infinity; its text says what, and no prompt."""


class ClaimLostError(HiDreamError):
    """This replica does not have the job any more: another one has it, or it has ended."""

    def __init__(self, job_id: str, claim_number: int) -> None:
        super().__init__(f"claim {claim_number} of job {job_id} is lost")
        self.job_id = job_id
        self.claim_number = claim_number
