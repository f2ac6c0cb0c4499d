import copy
import multiprocessing
import pickle
from concurrent.futures import ProcessPoolExecutor

import grpc
import pytest
from google.protobuf import duration_pb2
from google.protobuf.message import Message
from google.rpc import code_pb2, error_details_pb2, status_pb2

from hidream import errors
from hidream.batch_lines import InvalidLinesError, LineViolation
from hidream.errors import HiDreamError, error_from_call, error_from_status
from hidream.requests import generate_request


def status_of(code: int, *details: Message) -> status_pb2.Status:
    status = status_pb2.Status(code=code, message="what happened")
    for detail in details:
        status.details.add().Pack(detail)
    return status


def ended_call(
    code: grpc.StatusCode, message: str, trailing: tuple[tuple[str, str | bytes], ...] = ()
) -> grpc.aio.AioRpcError:
    return grpc.aio.AioRpcError(code, grpc.aio.Metadata(), grpc.aio.Metadata(*trailing), message)


def subclasses(kind: type[Exception]) -> set[type[Exception]]:
    return {kind}.union(*(subclasses(child) for child in kind.__subclasses__()))


TOO_LATE = error_details_pb2.QuotaFailure(
    violations=[
        error_details_pb2.QuotaFailure.Violation(
            subject="deadline", description="is in 2 s", quota_id="deadline"
        )
    ]
)
IN_THREE_SECONDS = error_details_pb2.RetryInfo(retry_delay=duration_pb2.Duration(seconds=3))


def test_invalid_argument_lists_every_violation() -> None:
    bad_request = error_details_pb2.BadRequest()
    bad_request.field_violations.add(field="spec.width", description="must be a multiple of 16")
    bad_request.field_violations.add(field="spec.seed", description="must be 0 or more")
    error = error_from_status(status_of(code_pb2.INVALID_ARGUMENT, bad_request))
    assert isinstance(error, errors.InvalidArgumentError)
    assert error.violations == (
        errors.FieldViolation("spec.width", "must be a multiple of 16"),
        errors.FieldViolation("spec.seed", "must be 0 or more"),
    )
    assert error.code is grpc.StatusCode.INVALID_ARGUMENT


def test_a_full_queue_says_which_limit_and_when_to_try_again() -> None:
    quota = error_details_pb2.QuotaFailure()
    quota.violations.add(subject="max_queued_jobs", description="is 8", quota_id="max_queued_jobs")
    error = error_from_status(status_of(code_pb2.RESOURCE_EXHAUSTED, quota, IN_THREE_SECONDS))
    assert isinstance(error, errors.QueueFullError)
    assert error.violations == (errors.QuotaViolation("max_queued_jobs", "is 8", "max_queued_jobs"),)
    assert error.retry_after_seconds == 3.0


def test_a_limit_of_a_caller_whose_name_is_deadline_is_no_deadline() -> None:
    quota = error_details_pb2.QuotaFailure()
    quota.violations.add(subject="deadline", description="is 8", quota_id="max_queued_jobs_per_caller")
    error = error_from_status(status_of(code_pb2.RESOURCE_EXHAUSTED, quota, IN_THREE_SECONDS))
    assert type(error) is errors.QueueFullError


def test_a_deadline_that_cannot_be_met_is_no_full_queue() -> None:
    error = error_from_status(status_of(code_pb2.RESOURCE_EXHAUSTED, TOO_LATE, IN_THREE_SECONDS))
    assert type(error) is errors.TooBusyForDeadlineError
    assert error.retry_after_seconds == 3.0


def test_what_is_too_large_for_ever_is_no_full_queue() -> None:
    error = error_from_status(status_of(code_pb2.RESOURCE_EXHAUSTED, error_details_pb2.QuotaFailure()))
    assert type(error) is errors.ResourceExhaustedError
    assert error.retry_after_seconds is None


def test_an_internal_error_tells_the_id_that_the_log_carries() -> None:
    info = error_details_pb2.ErrorInfo(reason="INTERNAL", metadata={"error_id": "a1b2"})
    error = error_from_status(status_of(code_pb2.INTERNAL, info))
    assert isinstance(error, errors.InternalError)
    assert error.error_id == "a1b2"


def test_a_damaged_image_is_named_by_its_job_and_number() -> None:
    info = error_details_pb2.ErrorInfo(
        reason="IMAGE_DAMAGED", metadata={"job_id": "job-1", "image_index": "2"}
    )
    error = error_from_status(status_of(code_pb2.DATA_LOSS, info))
    assert isinstance(error, errors.DataLossError)
    assert (error.job_id, error.image_index) == ("job-1", 2)
    unnamed = error_from_status(status_of(code_pb2.DATA_LOSS))
    assert isinstance(unnamed, errors.DataLossError)
    assert (unnamed.job_id, unnamed.image_index) == ("", None)


def test_details_travel_with_an_ended_call() -> None:
    status = status_of(code_pb2.UNAVAILABLE, IN_THREE_SECONDS)
    trailing = (("grpc-status-details-bin", status.SerializeToString()),)
    error = error_from_call(ended_call(grpc.StatusCode.UNAVAILABLE, "what happened", trailing))
    assert isinstance(error, errors.UnavailableError)
    assert error.retry_after_seconds == 3.0
    assert error.details == status


@pytest.mark.parametrize(
    "details",
    [
        pytest.param(b"\xff\xff", id="no status at all"),
        pytest.param(status_of(code_pb2.OK).SerializeToString(), id="a status of another code"),
    ],
)
def test_details_that_do_not_fit_the_call_are_left_out(details: bytes) -> None:
    trailing = (("grpc-status-details-bin", details),)
    error = error_from_call(ended_call(grpc.StatusCode.NOT_FOUND, "no such job", trailing))
    assert isinstance(error, errors.NotFoundError)
    assert str(error) == "no such job"


@pytest.mark.parametrize("code", [code for code in grpc.StatusCode if code is not grpc.StatusCode.OK])
def test_every_status_code_becomes_an_error_that_knows_it(code: grpc.StatusCode) -> None:
    error = error_from_call(ended_call(code, "what happened"))
    assert error.code is code
    assert error.message == "what happened"


def test_every_error_class_is_raised_for_some_status() -> None:
    statuses = [status_of(code) for code in code_pb2.Code.values() if code != code_pb2.OK]
    statuses.append(status_of(code_pb2.RESOURCE_EXHAUSTED, IN_THREE_SECONDS))
    statuses.append(status_of(code_pb2.RESOURCE_EXHAUSTED, TOO_LATE, IN_THREE_SECONDS))
    assert {type(error_from_status(status)) for status in statuses} == subclasses(errors.ServerError)


EXAMPLES: tuple[HiDreamError, ...] = (
    *(error_from_status(status_of(code)) for code in code_pb2.Code.values() if code != code_pb2.OK),
    error_from_status(status_of(code_pb2.RESOURCE_EXHAUSTED, IN_THREE_SECONDS)),
    error_from_status(status_of(code_pb2.RESOURCE_EXHAUSTED, TOO_LATE, IN_THREE_SECONDS)),
    errors.NotServingError(5.0, "NOT_SERVING"),
    errors.AddressError("a:0", "is none"),
    errors.EventLoopError(),
    errors.StreamError("a gap"),
    errors.BrokenImageError(1, "a gap"),
    InvalidLinesError([LineViolation(1, "seed", "is wrong")]),
)


def test_an_error_that_was_pickled_or_copied_says_the_same() -> None:
    assert {type(error) for error in EXAMPLES} >= subclasses(HiDreamError) - {HiDreamError}
    for error in EXAMPLES:
        error.add_note("a note")
        copies = [pickle.loads(pickle.dumps(error, protocol)) for protocol in range(6)]
        for copied in (*copies, copy.copy(error), copy.deepcopy(error)):
            assert type(copied) is type(error)
            assert (str(copied), copied.args, vars(copied)) == (str(error), error.args, vars(error))


def test_an_error_comes_back_from_a_process_pool() -> None:
    with (
        ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool,
        pytest.raises(errors.InvalidArgumentError) as caught,
    ):
        pool.submit(generate_request, "a", seed=2**64).result()
    assert [violation.field for violation in caught.value.violations] == ["spec.seed"]
