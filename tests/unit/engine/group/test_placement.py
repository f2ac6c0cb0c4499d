from __future__ import annotations

import pytest

from hidream_grpc.devices.detect import select_devices
from hidream_grpc.devices.device_types import CPU
from hidream_grpc.engine.group.placement import GroupPlacement
from hidream_grpc.model.parallel.layout import Layout

FOUR, TWO, ONE = Layout(tensor_parallel=4), Layout(tensor_parallel=2), Layout()


@pytest.fixture
def placement() -> GroupPlacement:
    """A placement of four ranks on five devices."""
    return GroupPlacement(select_devices(CPU, (0, 1, 2, 3, 4)), FOUR, (TWO, ONE))


def state(placement: GroupPlacement) -> tuple[Layout, tuple[int, ...], tuple[int, ...]]:
    now = placement.now
    return now.layout, now.devices.devices, now.devices.idle_devices


def test_the_first_devices_are_used(placement: GroupPlacement) -> None:
    assert state(placement) == (FOUR, (0, 1, 2, 3), (4,))
    assert placement.is_full


def test_a_spare_device_takes_the_place_of_one_that_failed(placement: GroupPlacement) -> None:
    assert placement.without((1,))
    assert state(placement) == (FOUR, (0, 2, 3, 4), (1,))
    assert placement.is_full


def test_ranks_are_those_of_the_layout_that_failed(placement: GroupPlacement) -> None:
    assert placement.without((0,))
    assert placement.without((0,))
    assert state(placement) == (TWO, (2, 3), (0, 1, 4))
    assert not placement.is_full
    assert placement.without((1,))
    assert state(placement) == (TWO, (2, 4), (0, 1, 3))
    assert placement.without((0,))
    assert state(placement) == (ONE, (4,), (0, 1, 2, 3))


def test_with_no_device_left_all_count_as_working_again(placement: GroupPlacement) -> None:
    assert placement.without((0, 1, 2, 3))
    assert state(placement) == (ONE, (4,), (0, 1, 2, 3))
    assert not placement.without((0,))
    assert state(placement) == (FOUR, (0, 1, 2, 3), (4,))


def test_a_layout_that_cannot_join_gives_way_to_the_next_smaller_one(placement: GroupPlacement) -> None:
    assert placement.smaller()
    assert state(placement) == (TWO, (0, 1), (2, 3, 4))
    assert placement.smaller()
    assert not placement.smaller()
    assert placement.is_full


def test_an_operator_gets_all_devices_back(placement: GroupPlacement) -> None:
    placement.without((0, 1))
    placement.reset()
    assert state(placement) == (FOUR, (0, 1, 2, 3), (4,))


def test_what_has_no_room_gives_way_to_the_next_layout_of_as_many_ranks() -> None:
    divided = Layout(expert_parallel=2)
    placement = GroupPlacement(select_devices(CPU, (0, 1, 2, 3)), FOUR, (TWO, divided, ONE))
    assert placement.without((3,))
    assert placement.now.layout == TWO
    assert placement.later()
    assert placement.now.layout == divided
    # What cannot join may be any of its devices' fault.
    assert placement.smaller()
    assert placement.now.layout == ONE


def test_a_layout_that_was_chosen_gives_way_for_good_where_it_has_no_room() -> None:
    placement = GroupPlacement(select_devices(CPU, (0, 1, 2, 3)), FOUR, (TWO, ONE))
    placement.request(TWO)
    assert placement.is_full
    assert state(placement) == (TWO, (0, 1), (2, 3))
    assert placement.without((0,))
    assert state(placement) == (TWO, (1, 2), (0, 3))
    placement.reset()
    assert placement.full_layout == TWO
