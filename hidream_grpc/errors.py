"""Every error of the service.

    HiDreamError
    ├── StartupError                    one line on the terminal, exit code 2, nothing loaded
    │   ├── ConfigurationError          a flag or variable is out of its range
    │   ├── AddressInUseError           another process listens there
    │   ├── ModelNotFoundError          a model folder is missing or incomplete
    │   └── DeviceUnavailableError      the device type or one of the devices is not there
    ├── RequestError                    the caller is told; the table is `server/status.py`
    │   ├── InvalidRequestError         one or more fields, all named
    │   ├── RequestIdConflictError      the request id was used with another request
    │   ├── QueueFullError              nothing was accepted
    │   ├── TooManyReadersError         the caller follows too many jobs at once
    │   ├── NotServingError             starting, draining, or the devices are lost
    │   ├── DeadlineExceededError       the caller's deadline passed before the job ended
    │   └── JobCancelledError           somebody cancelled the job
    ├── JobError                        a job that was accepted failed; the same table
    │   ├── StorageFullError            no room for the images
    │   ├── OutOfDeviceMemoryError      too large for the device, even alone
    │   └── JobInternalError            our fault; the log has the error id
    └── RankDiedError                   the rank group was lost; the engine recovers, no caller sees it

Facts are attributes, so that what handles an error never reads its text.
"""

from __future__ import annotations

import uuid
from dataclasses import dataclass
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


class DeviceUnavailableError(StartupError):
    """The device type, or one of the devices asked for, is not on this machine."""

    def __init__(self, flag: str, reason: str) -> None:
        super().__init__(f"{flag}: {reason}")
        self.flag = flag
        self.reason = reason


class RequestError(HiDreamError):
    """The caller asked for something that it cannot have (now, or at all)."""


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


class QueueFullError(RequestError):
    """The queue holds as many jobs as it may; nothing was accepted."""

    def __init__(self, max_queued_jobs: int, retry_after_seconds: float) -> None:
        super().__init__(f"the queue is full: max_queued_jobs is {max_queued_jobs}")
        self.max_queued_jobs = max_queued_jobs
        self.retry_after_seconds = retry_after_seconds


class TooManyReadersError(RequestError):
    """As many streams as the service allows are open."""

    def __init__(self, max_streams: int, retry_after_seconds: float) -> None:
        super().__init__(f"too many open streams: max_streams is {max_streams}")
        self.max_streams = max_streams
        self.retry_after_seconds = retry_after_seconds


class NotServingError(RequestError):
    """The service is starting or draining, or its devices are lost."""

    def __init__(self, reason: str, retry_after_seconds: float) -> None:
        super().__init__(reason)
        self.retry_after_seconds = retry_after_seconds


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


class RankDiedError(HiDreamError):
    """The rank group was lost while it worked; ranks names who died or hung."""

    def __init__(self, ranks: tuple[int, ...], reason: str) -> None:
        super().__init__(f"rank {', '.join(map(str, ranks))}: {reason}" if ranks else reason)
        self.ranks = ranks
        self.reason = reason
