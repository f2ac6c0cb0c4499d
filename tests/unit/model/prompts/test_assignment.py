from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hidream_grpc.model.prompts.assignment import assign_to_ranks

# Sizes of the released model in bfloat16.
RELEASED_BYTES = {
    "CLIP-L": 250_000_000,
    "CLIP-G": 1_400_000_000,
    "T5": 9_500_000_000,
    "Llama": 16_000_000_000,
}


@pytest.mark.parametrize(
    ("world_size", "expected"),
    [
        (1, {"CLIP-L": 0, "CLIP-G": 0, "T5": 0, "Llama": 0}),
        (2, {"CLIP-L": 1, "CLIP-G": 1, "T5": 1, "Llama": 0}),
        (4, {"CLIP-L": 3, "CLIP-G": 2, "T5": 1, "Llama": 0}),
        (8, {"CLIP-L": 3, "CLIP-G": 2, "T5": 1, "Llama": 0}),
    ],
)
def test_the_released_models_encoders_are_spread_over_the_ranks(
    world_size: int, expected: dict[str, int]
) -> None:
    assert assign_to_ranks(RELEASED_BYTES, world_size) == expected


@given(
    st.dictionaries(st.text(min_size=1), st.integers(1, 100), min_size=1, max_size=8),
    st.integers(1, 9),
    st.randoms(),
)
def test_every_rank_comes_to_the_same_assignment_in_whatever_order_it_lists_the_encoders(
    sizes_bytes: dict[str, int], world_size: int, random: object
) -> None:
    shuffled = list(sizes_bytes.items())
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    ranks = assign_to_ranks(sizes_bytes, world_size)
    assert assign_to_ranks(dict(shuffled), world_size) == ranks
    assert ranks.keys() == sizes_bytes.keys()
    loads = [sum(sizes_bytes[name] for name in ranks if ranks[name] == rank) for rank in range(world_size)]
    # Moving one encoder to another rank would not help any rank.
    smallest_of_fullest = min(sizes_bytes[name] for name in ranks if ranks[name] == loads.index(max(loads)))
    assert max(loads) - smallest_of_fullest <= min(loads)
