"""Each rule of the failure harness finds the history that breaks it, and leaves a good one alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from tests.failure.history import (
    Acknowledged,
    Cancelled,
    ChangeTold,
    Downloaded,
    FinalImage,
    FinalJob,
    History,
    ImageRequest,
    OpenStream,
    Told,
)
from tests.failure.promises import SILENT_SECONDS, Breach, breaches, count_by_rule

IMAGE_REQUEST = ImageRequest("a red circle", 64, 8, 1)
IMAGE = FinalImage(0, told_bytes=4, told_sha256="aa", num_bytes=4, sha256="aa")
FINAL = FinalJob("job", "one", "SUCCEEDED", (1, 2, 3), 0.1, (IMAGE,))
CANCELLED = FinalJob("gone", "one", "CANCELLED", (1, 0, 3))


def told(sequence: int, kind: str, **what: str) -> Told:
    return Told(what.get("reader", "reader"), "one", what.get("job_id", "job"), sequence, kind, 0.0)


def change(state: str, job_id: str = "job") -> ChangeTold:
    return ChangeTold("dashboard", "one", job_id, state, 0.0)


def good_history() -> History:
    """Two replicas, a job that succeeded, and one that was cancelled."""
    return History(
        acknowledged=[
            Acknowledged("job", "a", IMAGE_REQUEST, "one", is_alone=True),
            Acknowledged("job", "a", IMAGE_REQUEST, "two", is_alone=True),
            Acknowledged("gone", "b", IMAGE_REQUEST, "one"),
        ],
        cancelled=[Cancelled("gone", "RUNNING")],
        told=[told(1, "queued"), told(4, "progress"), told(9, "succeeded")],
        changes=[change("QUEUED"), change("RUNNING"), change("SUCCEEDED"), change("SUCCEEDED")],
        open_streams=[OpenStream("reader", "one", "job", SILENT_SECONDS / 2)],
        final_jobs=[FINAL, replace(FINAL, replica="two"), CANCELLED, replace(CANCELLED, replica="two")],
        stored_files=["images/job/3/0"],
        downloads=[Downloaded("job", "one", IMAGE)],
        refusals=[("SubmitJob", "UNAVAILABLE")],
    )


def test_an_image_of_a_job_whose_acknowledgement_was_lost_has_a_row() -> None:
    history = good_history()
    history.stored_files.append("images/unacknowledged/1/0")
    assert found_in(history) != []
    history.num_listed_images["unacknowledged"] = 1
    assert found_in(history) == []


def found_in(history: History, *, do_differ: bool = True) -> list[Breach]:
    return breaches(history, lambda _one, _other: do_differ)


def final(history: History, **changes: object) -> None:
    """Have the second replica tell something else of the job that succeeded."""
    history.final_jobs[1] = replace(FINAL, replica="two", **changes)  # type: ignore[arg-type]


def second_image(history: History, *, is_alone: bool) -> None:
    image = replace(IMAGE, told_sha256="bb", sha256="bb")
    history.acknowledged.append(Acknowledged("second", "c", IMAGE_REQUEST, "one", is_alone=is_alone))
    history.final_jobs.append(replace(FINAL, job_id="second", images=(image,)))
    history.stored_files.append("images/second/0")


def twice_drawn(history: History) -> None:
    history.acknowledged.append(Acknowledged("second", "a", IMAGE_REQUEST, "two"))
    history.final_jobs.append(replace(FINAL, job_id="second"))
    history.stored_files.append("images/second/0")


SPOILED: dict[str, tuple[str, Callable[[History], object]]] = {
    "a job that runs for ever": ("one terminal state", lambda h: final(h, state="RUNNING")),
    "a job that a replica does not know": ("one terminal state", lambda h: final(h, state="", images=())),
    "a job that no replica was asked about": (
        "one terminal state",
        lambda h: h.acknowledged.append(Acknowledged("lost", "x", IMAGE_REQUEST, "one")),
    ),
    "two ends on two replicas": ("one terminal state", lambda h: final(h, state="FAILED")),
    "a reader that saw another end": (
        "every reader saw the same end",
        lambda h: h.told.append(told(1, "failed", reader="other")),
    ),
    "a dashboard that saw another end": (
        "every reader saw the same end",
        lambda h: h.changes.append(change("CANCELLED")),
    ),
    "an event after the last": ("nothing follows an end", lambda h: h.told.append(told(10, "progress"))),
    "a job that runs after its end": (
        "nothing follows an end",
        lambda h: h.changes.append(change("RUNNING")),
    ),
    "a sequence that comes again after a reconnect": (
        "sequences grow",
        lambda h: h.told.insert(2, told(4, "progress")),
    ),
    "a sequence that falls": ("sequences grow", lambda h: h.told.insert(2, told(2, "progress"))),
    "a stream that hangs": (
        "no stream hangs",
        lambda h: h.open_streams.append(OpenStream("r", "one", "job", SILENT_SECONDS + 1)),
    ),
    "a cancelled job that failed": (
        "what was cancelled is cancelled",
        lambda h: h.final_jobs.__setitem__(2, replace(CANCELLED, state="FAILED")),
    ),
    "a job that succeeded though it was to be cancelled": (
        "what was cancelled is cancelled",
        lambda h: h.cancelled.append(Cancelled("job", "RUNNING")),
    ),
    "a job whose caller left that failed": (
        "what was cancelled is cancelled",
        lambda h: [
            h.cancelled.__setitem__(0, Cancelled("gone", "")),
            h.final_jobs.__setitem__(2, replace(CANCELLED, state="FAILED")),
        ],
    ),
    "a job that ended, and ended again": (
        "what was cancelled is cancelled",
        lambda h: h.cancelled.append(Cancelled("gone", "SUCCEEDED")),
    ),
    "a job that nobody cancelled": (
        "what nobody cancelled succeeds",
        lambda h: h.cancelled.clear(),
    ),
    "a request that was drawn twice": ("a retry follows its job", twice_drawn),
    "other pixels": (
        "equal requests give equal images",
        lambda h: second_image(h, is_alone=False),
    ),
    "an image that is cut short": (
        "images are whole",
        lambda h: final(h, images=(replace(IMAGE, num_bytes=3, sha256="cc"),)),
    ),
    "an image that cannot be read": (
        "images are whole",
        lambda h: final(h, images=(replace(IMAGE, problem="DATA_LOSS"),)),
    ),
    "a job without its image": ("images are whole", lambda h: final(h, images=())),
    "a download that ended early": (
        "images are whole",
        lambda h: h.downloads.append(Downloaded("job", "two", replace(IMAGE, num_bytes=0, sha256=""))),
    ),
    "an end before the start": ("times follow one another", lambda h: final(h, times=(1, 3, 2))),
    "a negative timing": ("times follow one another", lambda h: final(h, shortest_timing_seconds=-0.1)),
    "an image of no job": ("no file without a row", lambda h: h.stored_files.append("p/images/none/0")),
    "an image of another claim": ("no file without a row", lambda h: h.stored_files.append("images/job/2/0")),
    "a snapshot of a job that has ended": (
        "no file without a row",
        lambda h: h.stored_files.append("snapshots/job/3"),
    ),
    "an image that is said to be gone": (
        "a failure is a passing one",
        lambda h: h.note_refusal("DownloadImage", "NOT_FOUND"),
    ),
    "a file that belongs nowhere": ("no file without a row", lambda h: h.stored_files.append("stray")),
}


def test_a_good_history_keeps_every_promise() -> None:
    assert found_in(good_history()) == []


@pytest.mark.parametrize("name", SPOILED)
def test_a_spoiled_history_breaks_its_rule(name: str) -> None:
    rule, spoil = SPOILED[name]
    history = good_history()
    spoil(history)
    assert rule in count_by_rule(found_in(history))


def test_in_company_images_may_differ_by_rounding_and_alone_by_no_byte() -> None:
    history = good_history()
    second_image(history, is_alone=False)
    assert found_in(history, do_differ=False) == []
    history = good_history()
    second_image(history, is_alone=True)
    assert count_by_rule(found_in(history, do_differ=False)) == {"equal requests give equal images": 1}


def test_a_caller_with_a_deadline_may_miss_it() -> None:
    history = good_history()
    history.cancelled.clear()
    history.acknowledged[2] = replace(history.acknowledged[2], has_deadline=True)
    assert found_in(history) == []


def test_a_running_job_may_have_files_that_its_row_does_not_name_yet() -> None:
    history = good_history()
    history.final_jobs[2] = replace(CANCELLED, state="RUNNING")
    history.final_jobs[3] = replace(CANCELLED, state="RUNNING")
    history.stored_files += ["images/gone/0", "snapshots/gone/newest"]
    assert "no file without a row" not in count_by_rule(found_in(history))
