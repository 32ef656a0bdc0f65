"""Timing by clocks that the calls themselves move: no test here depends on the machine."""

import math
from collections.abc import Callable

import numpy as np
import pytest
from scipy import stats

from penjing.targets.timing import median_interval, time_calls


class Clock:
    """Stands still but for what ``call`` adds: ``seconds`` times a lognormal of width ``spread``."""

    def __init__(self) -> None:
        self.now, self.dice, self.log = 0.0, np.random.default_rng(0), list[str]()

    def __call__(self) -> float:
        return self.now

    def call(self, seconds: float, spread: float = 0.0, name: str = "") -> Callable[[], None]:
        def run() -> None:
            self.now += seconds * float(np.exp(spread * self.dice.standard_normal()))
            self.log.append(name)

        return run


@pytest.mark.parametrize("number", [6, 20, 37, 300])
def test_the_interval_is_scipys_binomial_one(number: int) -> None:
    """As in R's ``DescTools::MedianCI``: ranks qbinom(0.025, n, 1/2) and its mirror image."""
    rank = int(stats.binom.ppf(0.025, number, 0.5))
    assert median_interval(range(number)) == (rank - 1, number - rank)
    assert stats.binom.cdf(rank - 1, number, 0.5) <= 0.025 < stats.binom.cdf(rank, number, 0.5)


def test_the_interval_holds_the_median_of_95_in_100_samples() -> None:
    dice = np.random.default_rng(0)
    held = 0
    for _ in range(2000):
        low, high = median_interval(dice.exponential(size=41))
        held += low <= math.log(2) <= high
    assert 0.95 <= held / 2000 <= 0.98  # 41 coins: 97.2 %, the next pair has 93.5 %


def test_too_few_values_settle_nothing() -> None:
    assert median_interval(range(5)) == (-math.inf, math.inf)


def test_a_settled_median_takes_20_runs() -> None:
    clock = Clock()
    (row,) = time_calls([clock.call(0.0001)], clock=clock)
    assert row.runs == 20
    assert row.median_ms == pytest.approx(0.1)
    assert clock.now == pytest.approx(30 * 0.0001)  # 10 of them to warm up


def test_a_noisy_one_gets_more_until_its_interval_is_1_percent() -> None:
    runs = []
    for spread in (0.002, 0.02, 0.04, 0.2):
        clock = Clock()
        (row,) = time_calls([clock.call(0.001, spread)], runs=1000, clock=clock)
        runs.append(row.runs)
        assert row.median_ms == pytest.approx(1, rel=0.01) or row.runs == 1000
    assert runs == sorted(runs) and runs[0] == 20 and runs[-1] == 1000
    # The interval of a lognormal's median is 2 * 1.96 * 1.25 * spread / sqrt(runs) wide.
    assert runs[1] == pytest.approx((4.9 * 0.02 / 0.01) ** 2, rel=0.5)


def test_all_calls_wait_for_the_one_that_has_not_settled() -> None:
    clock = Clock()
    calls = [clock.call(0.001, 0.0, "still"), clock.call(0.001, 0.3, "noisy")]
    rows = time_calls(calls, runs=100, clock=clock)
    assert [row.runs for row in rows] == [100, 100]


def test_calls_take_turns_in_an_order_that_changes() -> None:
    clock = Clock()
    time_calls([clock.call(1, 0, "a"), clock.call(1, 0, "b")], runs=50, warmup=0, clock=clock)
    rounds = ["".join(clock.log[i : i + 2]) for i in range(0, len(clock.log), 2)]
    assert set(rounds) == {"ab", "ba"}


@pytest.mark.parametrize(("seconds", "runs"), [(10.0, 10), (3.5, 3), (0.1, 3), (15.2, 15)])
def test_a_slow_call_takes_no_more_than_its_seconds(seconds: float, runs: int) -> None:
    clock = Clock()
    (row,) = time_calls([clock.call(1.0)], seconds=seconds, warmup=10, clock=clock)
    assert row.runs == runs
    assert clock.now <= max(seconds, 3) + math.ceil(seconds / 10)


def test_exactly_so_many_runs_where_they_are_asked_for() -> None:
    clock = Clock()
    rows = time_calls(
        [clock.call(5.0), clock.call(0.1)], runs=57, seconds=math.inf, settled=0, clock=clock
    )
    assert [row.runs for row in rows] == [57, 57]
