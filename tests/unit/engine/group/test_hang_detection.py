from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from hidream_grpc.engine.group.hang_detection import HangDetector, RankSample

LIMIT_SECONDS = 5.0


def sample(
    *, waits: bool = False, collectives: int = 0, runs: bool = False, cpu_seconds: float = 0.0
) -> RankSample:
    return RankSample(waits, collectives, runs, cpu_seconds)


def detector(num_threads: int = 1, *, may_all_wait: bool = False) -> HangDetector:
    return HangDetector(LIMIT_SECONDS, num_threads, may_all_wait=may_all_wait)


def hanging_after(hangs: HangDetector, num_samples: int, **ranks: object) -> dict[int, str]:
    """The first ranks found to hang, where each rank's function returns its sample for a second."""
    for second in range(num_samples):
        samples = {int(name[4:]): sample_at(second) for name, sample_at in ranks.items()}  # type: ignore[operator]
        if hanging := hangs.observe(samples, 1.0):
            return hanging
    return {}


def test_a_rank_that_does_nothing_hangs_and_those_that_wait_for_it_do_not() -> None:
    hanging = hanging_after(detector(), 20, rank0=lambda _s: sample(waits=True), rank2=lambda _s: sample())
    assert hanging == {2: "does nothing since 6 s"}


def test_a_rank_that_computes_for_ever_hangs() -> None:
    hanging = hanging_after(
        detector(),
        20,
        rank0=lambda _s: sample(waits=True),
        rank1=lambda s: sample(runs=True, cpu_seconds=100.0 + s),
    )
    assert hanging == {1: "has computed for 6 s"}


def test_threads_may_compute_beside_each_other_for_as_long() -> None:
    def computes(second: int) -> RankSample:
        return sample(runs=True, cpu_seconds=4.0 * second)

    assert not hanging_after(detector(num_threads=4), 6, rank0=computes)
    assert hanging_after(detector(num_threads=4), 8, rank0=computes)


def test_a_rank_that_hardly_gets_a_core_does_not_hang() -> None:
    starved = {"rank0": lambda s: sample(runs=True, cpu_seconds=0.01 * s)}
    assert not hanging_after(detector(), 300, **starved)


def test_a_rank_whose_exchanges_go_on_does_not_hang() -> None:
    assert not hanging_after(detector(), 300, rank0=lambda s: sample(collectives=2 * s))


def test_ranks_that_all_wait_for_each_other_all_hang() -> None:
    def waits(_second: int) -> RankSample:
        return sample(waits=True, collectives=7)

    assert set(hanging_after(detector(), 20, rank0=waits, rank1=waits)) == {0, 1}
    assert not hanging_after(detector(may_all_wait=True), 300, rank0=waits, rank1=waits)


@given(st.lists(st.booleans(), min_size=1, max_size=40))
def test_a_rank_is_idle_from_its_last_sign_of_life_only(signs: list[bool]) -> None:
    hangs = detector()
    cpu_seconds, idle_seconds = 0.0, 0.0
    for number, sign in enumerate(signs):
        # Sixteenths of seconds add up exactly; the CPU limit is never reached.
        cpu_seconds += 0.0625 * sign
        idle_seconds = 0.0 if sign or number == 0 else idle_seconds + 1.0
        hanging = hangs.observe({0: sample(cpu_seconds=cpu_seconds)}, 1.0)
        assert bool(hanging) == (idle_seconds > LIMIT_SECONDS)
