from typing import Any

import pytest

from hidream.info_table import info_table
from hidream.terminal import format_seconds
from hidream.v1 import server_info_pb2


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.085, "85 ms"), (3.21, "3.2 s"), (59.99, "1 min 0 s"), (125.4, "2 min 5 s")]
)
def test_durations_read_well(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text


def test_the_table_shows_every_limit_and_leaves_out_what_is_not_known() -> None:
    names = [field.name for field in server_info_pb2.RequestLimits.DESCRIPTOR.fields]
    by_encoder = "max_prompt_tokens_by_encoder"
    values: dict[str, Any] = dict.fromkeys(names, 7) | {by_encoder: {"T5": 256, "CLIP-L": 218}}
    limits = server_info_pb2.RequestLimits(**values)
    info = server_info_pb2.ServerInfo(state=server_info_pb2.SERVER_STATE_STARTING, limits=limits)
    rows = dict(line.split(maxsplit=1) for line in info_table(info).splitlines())
    assert rows["state"] == "STARTING"
    expected = dict.fromkeys(names, "7") | {by_encoder: "CLIP-L 218, T5 256"}
    assert {name: rows[name] for name in names} == expected
    assert "layout" not in rows
