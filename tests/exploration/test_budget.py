from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penjing.errors import PenjingError
from penjing.exploration.budget import Budget, describe
from penjing.units import BYTES, parsed


@pytest.mark.parametrize(
    ("limits", "expected"),
    [
        ({"size": "300KB"}, 300_000),
        ({"size": "1.5 MiB"}, 1_572_864),
        ({"size": 4096}, 4096),
        ({"latency": "2ms"}, 2.0),
        ({"latency": "250us"}, 0.25),
        ({"drop": "1%"}, 0.01),
        ({"drop": 0.005}, 0.005),
        ({"drop": 0}, 0.0),
    ],
)
def test_limits_are_read_with_their_units(limits: dict, expected: float) -> None:
    (name,) = limits
    assert getattr(Budget(**limits), name) == pytest.approx(expected)


@pytest.mark.parametrize("value", ["", "big", "-3KB", "3 parsecs", "0KB", "1e"])
def test_a_wrong_limit_says_what_was_expected(value: str) -> None:
    with pytest.raises(PenjingError, match="size must be a positive number with a unit of"):
        Budget(size=value)


@given(st.integers(1, 10**9), st.sampled_from(sorted(BYTES)))
def test_a_quantity_is_number_times_unit(number: int, unit: str) -> None:
    assert parsed(f"{number}{unit}", BYTES, "size") == number * BYTES[unit]


def test_only_exceeded_limits_are_named() -> None:
    budget = Budget(size=1000, drop=0.01)
    assert budget.excess(size=1000, latency=99, drop=0.01) == {}
    assert budget.excess(size=1001, latency=99, drop=0.0) == {"size": (1001, 1000)}


def test_what_is_exceeded_is_said_with_units() -> None:
    excess = Budget(size="43KB", drop="0.2%").excess(size=52_749, latency=1, drop=0.0024)
    assert describe(excess) == "size 52.7 KB of at most 43.0 KB, drop 0.24% of at most 0.20%"
