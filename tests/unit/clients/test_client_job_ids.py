from collections.abc import Sequence
from typing import Any, cast

import pytest
import typer

from hidream.client import Client
from hidream.job_ids import short_ids, whole_ids
from hidream.v1 import image_gen_pb2, job_pb2

FIRST, SECOND, OTHER = "0123456789" + "a" * 22, "0123456789" + "b" * 22, "f" * 32


class ListingClient:
    """Lists jobs, one a page, and counts how often it was asked."""

    def __init__(self, job_ids: Sequence[str]) -> None:
        self._job_ids = job_ids
        self.num_calls = 0

    def list_page(self, *, page_token: str, **_: Any) -> image_gen_pb2.ListJobsResponse:
        self.num_calls += 1
        number = int(page_token or 0)
        following = str(number + 1) if number + 1 < len(self._job_ids) else ""
        jobs = [job_pb2.Job(job_id=job_id) for job_id in self._job_ids[number : number + 1]]
        return image_gen_pb2.ListJobsResponse(jobs=jobs, next_page_token=following)


def whole(*typed: str, among: ListingClient) -> list[str]:
    return whole_ids(cast(Client, among), typed, timeout_seconds=None)


def test_short_ids_are_as_long_as_it_takes_to_tell_them_apart() -> None:
    assert short_ids([FIRST, OTHER]) == ["01234567", "ffffffff"]
    assert short_ids([FIRST, SECOND, FIRST]) == ["0123456789a", "0123456789b", "0123456789a"]
    assert short_ids([]) == []


def test_the_beginning_of_an_id_means_the_job_that_it_begins() -> None:
    listing = ListingClient([FIRST, SECOND, OTHER])
    assert whole("ffff", "0123456789b", "ffff", among=listing) == [OTHER, SECOND, OTHER]
    assert listing.num_calls == 3


def test_a_whole_id_and_what_is_none_are_not_looked_for() -> None:
    listing = ListingClient([FIRST])
    assert whole(FIRST, "no-such-job", "012", among=listing) == [FIRST, "no-such-job", "012"]
    assert listing.num_calls == 0


def test_the_beginning_of_no_job_is_left_for_the_server_to_refuse() -> None:
    assert whole("0000", among=ListingClient([])) == ["0000"]


def test_the_beginning_of_several_jobs_is_refused_with_their_ids() -> None:
    with pytest.raises(typer.BadParameter, match="begins several jobs: 0123456789a, 0123456789b"):
        whole("0123", among=ListingClient([FIRST, SECOND]))
