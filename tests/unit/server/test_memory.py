from __future__ import annotations

import gc

from hidream_grpc.server.memory import exclude_from_collection


def test_what_is_there_at_the_start_is_no_work_for_later_collections() -> None:
    there: list[object] = [[]]
    assert any(known is there for known in gc.get_objects())
    exclude_from_collection()
    came_later: list[object] = [[]]
    assert not any(known is there for known in gc.get_objects())
    assert any(known is came_later for known in gc.get_objects())
