import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penjing import units
from penjing.report import plots
from penjing.report.study import best

PERCENT = units.ScoreUnit(percent=True)


def traces(figure) -> dict:
    return {trace.name: trace for trace in figure.data}


@given(st.lists(st.tuples(st.integers(1, 20), st.integers(0, 20)), min_size=1, max_size=12))
def test_not_dominated_is_the_pareto_set(pairs):
    """Against the definition: nothing is at least as small and as good, and better in one."""
    points = [{"packed_bytes": size, "score": score} for size, score in pairs]
    expected = {
        a for a in pairs if not any(b != a and b[0] <= a[0] and b[1] >= a[1] for b in pairs)
    }
    found = [(p["packed_bytes"], p["score"]) for p in plots.not_dominated(points, plots.SIZE)]
    assert set(found) == expected
    assert all(a[0] < b[0] and a[1] < b[1] for a, b in itertools.pairwise(found))


def test_each_point_is_drawn_once(study):
    drawn = traces(plots.frontier(study, best(study), plots.SIZE, PERCENT))
    groups = ["dominated", "on the frontier", "original", "best"]
    xs = [x for group in groups for x in drawn[group].x]
    assert sorted(xs) == sorted(point["packed_bytes"] / 1000 for point in study["points"])
    assert drawn["at most 80 KB"].x == (80.0, 80.0)
    assert drawn["at least 86.94 %"].y[0] == pytest.approx(86.94)


def test_latency_bars_reach_from_p10_to_p90(study):
    point = best(study)
    drawn = traces(plots.frontier(study, point, plots.LATENCY, PERCENT))
    star = drawn["best"]
    assert star.x[0] - star.error_x.arrayminus[0] == pytest.approx(point["latency_p10_ms"])
    assert star.x[0] + star.error_x.array[0] == pytest.approx(point["latency_p90_ms"])


def test_score_bars_reach_as_far_as_the_drops_bounds(study):
    point = best(study)
    drawn = traces(plots.frontier(study, point, plots.SIZE, PERCENT))
    star = drawn["best"]
    lowest = 100 * (study["baseline"]["score"] - point["drop_high"])
    highest = 100 * (study["baseline"]["score"] - point["drop_low"])
    assert star.y[0] - star.error_y.arrayminus[0] == pytest.approx(lowest)
    assert star.y[0] + star.error_y.array[0] == pytest.approx(highest)
    assert drawn["dominated"].error_y.array is None
    point["drop_low"] = -0.5  # no score is above 100 %
    star = traces(plots.frontier(study, point, plots.SIZE, PERCENT))["best"]
    assert star.y[0] + star.error_y.array[0] == pytest.approx(100)


def test_hover_holds_every_figure(study):
    text = plots.hover(best(study), PERCENT)
    for expected in ("packed: ", "ONNX: ", "MACs: ", "peak RAM: ", "test drop: ", study["best"]):
        assert expected in text


def test_a_useless_point_does_not_flatten_the_plot_but_the_shown_one_is_seen(study):
    study["points"][3]["score"] = 0.1
    figure = plots.frontier(study, best(study), plots.SIZE, PERCENT)
    assert figure.layout.yaxis.range[0] > 70
    assert study["points"][3] in plots.below(study, best(study))
    figure = plots.frontier(study, study["points"][3], plots.SIZE, PERCENT)
    assert figure.layout.yaxis.range[0] < 10
