from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hidream_grpc.model.parallel.layout import AXIS_KEYS, Layout, share


@pytest.mark.parametrize(("axis", "size"), [*((axis, 0) for axis in AXIS_KEYS.values()), ("cfg_parallel", 3)])
def test_a_layout_that_cannot_be_says_which_axis(axis: str, size: int) -> None:
    with pytest.raises(ValueError, match=f"{axis} must be .*, not {size}"):
        Layout(**{axis: size})


@pytest.mark.parametrize(
    ("layout", "text"),
    [
        (Layout(), "tp=1"),
        (Layout(data_parallel=3), "dp=3"),
        (Layout(tensor_parallel=4, expert_parallel=2), "tp=4,ep=2"),
        (
            Layout(
                tensor_parallel=5, expert_parallel=4, cfg_parallel=2, sequence_parallel=4, data_parallel=3
            ),
            "tp=5,ep=4,cfg=2,sp=4,dp=3",
        ),
    ],
    ids=str,
)
def test_a_layout_reads_as_operators_write_it(layout: Layout, text: str) -> None:
    assert str(layout) == text


@given(
    count=st.integers(min_value=0, max_value=200),
    size=st.integers(min_value=1, max_value=12),
    multiple=st.integers(min_value=1, max_value=16),
)
def test_shares_put_together_are_the_whole_and_differ_by_one_unit_at_most(
    count: int, size: int, multiple: int
) -> None:
    shares = [share(count, index, size, multiple) for index in range(size)]
    assert [thing for one in shares for thing in one] == list(range(count))
    num_units = [-(-len(one) // multiple) for one in shares]
    assert max(num_units) - min(num_units) <= 1
    held = [one for one in shares if one]
    assert all(len(one) % multiple == 0 for one in held[:-1])
