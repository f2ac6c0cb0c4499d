from __future__ import annotations

import pytest
from sqlalchemy.exc import TimeoutError as SQLAlchemyTimeoutError

from hidream_grpc.background import cause_of
from hidream_grpc.errors import StoreUnavailableError
from hidream_grpc.jobs.store.failures import translated


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (SQLAlchemyTimeoutError("QueuePool limit of size 5"), "no session was free in time"),
        (TimeoutError(), "no answer in time"),
        (TimeoutError("cannot connect to h:1: no answer"), "cannot connect to h:1: no answer"),
    ],
    ids=["a pool", "an answer", "a host"],
)
def test_a_database_that_takes_too_long_is_told_in_words(error: Exception, reason: str) -> None:
    with pytest.raises(StoreUnavailableError) as unavailable, translated():
        raise error
    assert cause_of(unavailable.value) == reason
