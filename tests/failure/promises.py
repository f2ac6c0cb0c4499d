"""The promises of the service, each a rule over a history; nothing here talks to a server."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from tests.failure.history import ENDS, FinalImage, FinalJob, History, ImageRequest

NUM_SHOWN = 5
ENDED = frozenset(ENDS.values())
SILENT_SECONDS = 10.0
"""A stream has news, or ends, within 2 s of all being well; five times as long on busy cores."""
ARTIFACT_FOLDERS = ("images", "snapshots")

PASSING = frozenset({"UNAVAILABLE", "DEADLINE_EXCEEDED", "CANCELLED", "RESOURCE_EXHAUSTED"})
"""What a call may be answered with while things fail: nothing that says that a job or image is gone."""

Differ = Callable[[str, str], bool]
"""Whether the images of two files, by SHA-256, differ by more than other company may make them."""


@dataclass(frozen=True, slots=True)
class Breach:
    """A promise that was not kept."""

    rule: str
    what: str

    def __str__(self) -> str:
        return f"{self.rule}: {self.what}"


def breaches(history: History, differ: Differ) -> list[Breach]:
    """Every promise that the history breaks."""
    finals = _by_job(history.final_jobs)
    return [
        *_one_terminal_state(history, finals),
        *_readers_agree(history, finals),
        *_nothing_follows_an_end(history),
        *_sequences_grow(history),
        *_no_stream_hangs(history),
        *_cancelled_stay_cancelled(history, finals),
        *_others_succeed(history, finals),
        *_retries_follow_their_job(history, finals),
        *_equal_requests_give_equal_images(history, finals, differ),
        *_images_are_whole(history),
        *_times_follow(history),
        *_no_file_without_a_row(history),
        *_answers_are_passing(history),
    ]


def shown(found: Sequence[Breach]) -> str:
    """The first breaches of each rule, one a line."""
    by_rule: dict[str, list[Breach]] = defaultdict(list)
    for breach in found:
        by_rule[breach.rule].append(breach)
    return "\n".join(str(breach) for each in by_rule.values() for breach in each[:NUM_SHOWN])


def count_by_rule(found: Iterable[Breach]) -> dict[str, int]:
    """How often each rule was broken."""
    return dict(sorted(Counter(breach.rule for breach in found).items()))


def _by_job(finals: Iterable[FinalJob]) -> dict[str, list[FinalJob]]:
    jobs: dict[str, list[FinalJob]] = defaultdict(list)
    for final in finals:
        jobs[final.job_id].append(final)
    return jobs


def _job_ids(history: History) -> Iterator[str]:
    """Every acknowledged job, once."""
    yield from dict.fromkeys(each.job_id for each in history.acknowledged)


def _one_terminal_state(history: History, finals: Mapping[str, list[FinalJob]]) -> Iterator[Breach]:
    rule = "one terminal state"
    for job_id in _job_ids(history):
        told = {(final.replica, final.state or "unknown") for final in finals.get(job_id, ())}
        states = {state for _, state in told}
        if not states:
            yield Breach(rule, f"job {job_id}: no replica was asked")
        elif len(states) > 1 or not states <= ENDED:
            yield Breach(rule, f"job {job_id} is {sorted(told)}")


def _readers_agree(history: History, finals: Mapping[str, list[FinalJob]]) -> Iterator[Breach]:
    rule = "every reader saw the same end"
    ends = [(told.reader, told.job_id, ENDS[told.kind]) for told in history.told if told.kind in ENDS]
    ends += [(told.reader, told.job_id, told.state) for told in history.changes if told.state in ENDED]
    for reader, job_id, state in dict.fromkeys(ends):
        others = {final.state for final in finals.get(job_id, ())}
        others.discard("")
        if others and others != {state}:
            yield Breach(rule, f"{reader} saw job {job_id} end as {state}, replicas say {sorted(others)}")


def _nothing_follows_an_end(history: History) -> Iterator[Breach]:
    rule = "nothing follows an end"
    ended: dict[tuple[str, str], str] = {}
    for told in history.told:
        key = (told.reader, told.job_id)
        if key in ended:
            yield Breach(rule, f"{told.reader}: {told.kind} after {ended[key]} of job {told.job_id}")
        elif told.kind in ENDS:
            ended[key] = told.kind
    states: dict[tuple[str, str], str] = {}
    for change in history.changes:
        key = (change.reader, change.job_id)
        before = states.get(key, "")
        if before in ENDED and change.state != before:
            yield Breach(rule, f"{change.reader}: job {change.job_id} is {change.state} after {before}")
        states[key] = change.state


def _sequences_grow(history: History) -> Iterator[Breach]:
    streams: dict[tuple[str, str], list[int]] = defaultdict(list)
    for told in history.told:
        streams[told.reader, told.job_id].append(told.sequence)
    for (reader, job_id), sequences in streams.items():
        for before, after in pairwise(sequences):
            if after <= before:
                yield Breach("sequences grow", f"{reader}: {after} came after {before} of job {job_id}")
                break


def _no_stream_hangs(history: History) -> Iterator[Breach]:
    for stream in history.open_streams:
        if stream.silent_seconds > SILENT_SECONDS:
            where = f"{stream.reader} at {stream.replica}"
            yield Breach("no stream hangs", f"{where}, job {stream.job_id}: {stream.silent_seconds:.1f} s")


def _cancelled_stay_cancelled(history: History, finals: Mapping[str, list[FinalJob]]) -> Iterator[Breach]:
    rule = "what was cancelled is cancelled"
    for job_id, states in _cancels(history).items():
        ended_as = next((state for state in states if state in ENDED), None)
        was_running = any(state and state not in ENDED for state in states)
        for final in finals.get(job_id, ()):
            if final.state not in ENDED:
                continue
            if was_running and final.state != "CANCELLED":
                what = f"job {job_id} was to be cancelled, and is {final.state}: {final.error}"
                yield Breach(rule, what)
            elif ended_as is not None and final.state != ended_as:
                yield Breach(rule, f"job {job_id} had ended as {ended_as}, and is {final.state}")
            elif final.state == "FAILED":
                yield Breach(rule, f"job {job_id} was left by its caller, and FAILED: {final.error}")


def _cancels(history: History) -> dict[str, list[str]]:
    cancels: dict[str, list[str]] = defaultdict(list)
    for cancelled in history.cancelled:
        cancels[cancelled.job_id].append(cancelled.state)
    return cancels


def _others_succeed(history: History, finals: Mapping[str, list[FinalJob]]) -> Iterator[Breach]:
    excused = set(_cancels(history)) | {each.job_id for each in history.acknowledged if each.has_deadline}
    for job_id in _job_ids(history):
        for final in finals.get(job_id, ()):
            if job_id not in excused and final.state in ("FAILED", "CANCELLED"):
                what = f"job {job_id} is {final.state} at {final.replica}: {final.error}"
                yield Breach("what nobody cancelled succeeds", what)


def _retries_follow_their_job(history: History, finals: Mapping[str, list[FinalJob]]) -> Iterator[Breach]:
    """A request id stands for one job, unless that failed or was cancelled."""
    jobs: dict[str, list[str]] = defaultdict(list)
    for each in history.acknowledged:
        if each.job_id not in jobs[each.request_id]:
            jobs[each.request_id].append(each.job_id)
    for request_id, job_ids in jobs.items():
        drawn = [
            job_id
            for job_id in job_ids
            if any(final.state == "SUCCEEDED" for final in finals.get(job_id, ()))
        ]
        if len(drawn) > 1:
            yield Breach("a retry follows its job", f"request {request_id} is jobs {', '.join(drawn)}")


def _equal_requests_give_equal_images(
    history: History, finals: Mapping[str, list[FinalJob]], differ: Differ
) -> Iterator[Breach]:
    rule = "equal requests give equal images"
    first_of: dict[tuple[ImageRequest, int], tuple[str, str]] = {}
    alone_of: dict[tuple[ImageRequest, int], tuple[str, str]] = {}
    for job in {each.job_id: each for each in history.acknowledged}.values():
        for image in _images_of(finals.get(job.job_id, ())):
            key = (job.image_request, image.index)
            if job.is_alone:
                other, sha256 = alone_of.setdefault(key, (job.job_id, image.sha256))
                if sha256 != image.sha256:
                    yield Breach(rule, f"jobs {other} and {job.job_id}, each alone: other bytes")
            other, sha256 = first_of.setdefault(key, (job.job_id, image.sha256))
            if sha256 != image.sha256 and differ(sha256, image.sha256):
                yield Breach(rule, f"jobs {other} and {job.job_id}: other pixels")


def _images_of(finals: Iterable[FinalJob]) -> Iterator[FinalImage]:
    """The images of one job, once each, of those that were downloaded whole."""
    seen = set()
    for final in finals:
        for image in final.images:
            if not image.problem and image.index not in seen:
                seen.add(image.index)
                yield image


def _images_are_whole(history: History) -> Iterator[Breach]:
    rule = "images are whole"
    for final in history.final_jobs:
        where = f"job {final.job_id} at {final.replica}"
        if final.state == "SUCCEEDED" and not final.images:
            yield Breach(rule, f"{where} has none")
        for image in final.images:
            yield from _image_is_whole(where, image)
    for each in history.downloads:
        yield from _image_is_whole(f"while things failed, job {each.job_id} at {each.replica}", each.image)


def _image_is_whole(where: str, image: FinalImage) -> Iterator[Breach]:
    rule = "images are whole"
    if image.problem:
        yield Breach(rule, f"{where}, image {image.index}: {image.problem}")
    elif (image.num_bytes, image.sha256) != (image.told_bytes, image.told_sha256):
        told = f"{image.num_bytes} bytes of {image.told_bytes}"
        yield Breach(rule, f"{where}, image {image.index}: {told}, or another SHA-256")


def _times_follow(history: History) -> Iterator[Breach]:
    rule = "times follow one another"
    # Of one replica: all read the same row.
    for final in {each.job_id: each for each in history.final_jobs if each.state}.values():
        present = [time for time in final.times if time]
        if present != sorted(present):
            yield Breach(rule, f"job {final.job_id}: {final.times}")
        elif final.shortest_timing_seconds < 0:
            yield Breach(rule, f"job {final.job_id}: {final.shortest_timing_seconds} s")


def _no_file_without_a_row(history: History) -> Iterator[Breach]:
    """Images belong to jobs that name them; a job that has ended needs no snapshot."""
    images = dict(history.num_listed_images)
    images.update({final.job_id: len(final.images) for final in history.final_jobs if final.state})
    unended = {final.job_id for final in history.final_jobs if final.state and final.state not in ENDED}
    num_files: Counter[str] = Counter()
    for path in history.stored_files:
        if path.rpartition("/")[2] == "store_id":
            # Names the job store that all of them belong to.
            continue
        folder, job_id = _owner(path)
        if folder == "images" and job_id in images:
            num_files[job_id] += 1
            if num_files[job_id] <= images[job_id] or job_id in unended:
                continue
        elif folder == "snapshots" and job_id in unended:
            continue
        yield Breach("no file without a row", path)


def _answers_are_passing(history: History) -> Iterator[Breach]:
    for (call, code), count in Counter(history.refusals).items():
        if code not in PASSING:
            yield Breach("a failure is a passing one", f"{call} answered {code}, {count} times")


def _owner(path: str) -> tuple[str, str]:
    """The folder and the job of a stored file, whatever its name below that is."""
    parts = path.split("/")
    for number, part in enumerate(parts[:-1]):
        if part in ARTIFACT_FOLDERS:
            return part, parts[number + 1]
    return "", ""
