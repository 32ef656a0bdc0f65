from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penjing.report.contributions import MEASURES, contributions


def point(**values: float | None) -> dict[str, Any]:
    return dict.fromkeys(MEASURES, 0.0) | values


def stage(index: int, **values: float | None) -> dict[str, Any]:
    return point(**values) | {"stage": index, "techniques": ["quantize"]}


def test_changes_are_from_the_stage_before():
    stages = [
        stage(1, packed_bytes=400, latency_ms=0.8, score=0.88),
        stage(2, packed_bytes=50, latency_ms=0.3, score=0.87),
    ]
    start = point(packed_bytes=1000, latency_ms=1.0, score=0.89)
    first, second = contributions({"contributions": stages}, start)
    assert (first.change["packed_bytes"], second.change["packed_bytes"]) == (-600, -350)
    assert first.change["latency_ms"] == pytest.approx(-0.2)
    assert second.change["score"] == pytest.approx(-0.01)
    assert second.after["packed_bytes"] == 50


@given(st.lists(st.integers(1, 10**9), min_size=1, max_size=6), st.integers(1, 10**9))
def test_changes_add_up_to_the_whole(sizes, start):
    made = [stage(index, packed_bytes=size) for index, size in enumerate(sizes)]
    found = contributions({"contributions": made}, point(packed_bytes=start))
    assert sum(step.change["packed_bytes"] for step in found) == sizes[-1] - start


def test_what_was_not_measured_has_no_change():
    stages = [stage(1, latency_ms=None), stage(2, latency_ms=0.3)]
    found = contributions({"contributions": stages}, point(latency_ms=1.0))
    assert [step.change["latency_ms"] for step in found] == [None, None]


def test_settings_come_from_the_recipe(study):
    best = next(p for p in study["points"] if p["name"] == study["best"])
    said = [step.techniques for step in contributions(best, study["baseline"])]
    assert said == [
        "prune_channels (ratio 0.35) + training (1 epoch)",
        "prune_weights (sparsity 0.5) + quantize (weight_bits 4, activation_bits 8)"
        " + training (1 epoch)",
    ]
