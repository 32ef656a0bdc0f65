"""Recall and precision against counting by hand."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from penjing.tasks import detection_metrics

TRUTH = [np.array([[0.1, 0.1, 0.3, 0.2], [0.5, 0.5, 0.9, 0.7]]), np.array([[0.2, 0.2, 0.4, 0.4]])]


def scored(boxes: np.ndarray, *scores: float) -> np.ndarray:
    return np.concatenate([boxes, np.array(scores)[:, None]], axis=1)


def test_perfect_detections_score_one():
    found = [scored(TRUTH[0], 0.9, 0.8), scored(TRUTH[1], 0.7)]
    assert detection_metrics.average_precision(found, TRUTH) == {
        "AP": 1.0,
        "AP50": 1.0,
        "AP75": 1.0,
    }
    assert detection_metrics.recall_at(found, TRUTH, 0.0) == (1.0, 0.35)


def test_average_precision_of_a_known_ranking():
    # Right, wrong, right, missed: precision 1 up to recall 1/3, then 2/3 up to 2/3, then none.
    wrong = np.array([[0.6, 0.0, 0.8, 0.1]])
    found = [np.concatenate([scored(TRUTH[0][:1], 0.9), scored(wrong, 0.8)]), scored(TRUTH[1], 0.7)]
    levels = np.linspace(0, 1, 101)
    expected = np.where(levels <= 1 / 3, 1.0, np.where(levels <= 2 / 3, 2 / 3, 0.0)).mean()
    assert abs(detection_metrics.average_precision(found, TRUTH)["AP50"] - expected) < 1e-6


def test_a_second_detection_of_one_object_is_a_false_positive():
    found = [scored(np.repeat(TRUTH[0][:1], 2, axis=0), 0.9, 0.8), np.empty((0, 5))]
    assert detection_metrics.count(found, TRUTH) == (1, 1)


def test_the_threshold_lies_between_two_scores():
    wrong = np.array([[0.6, 0.0, 0.8, 0.1]])
    found = [np.concatenate([scored(TRUTH[0][:1], 0.9), scored(wrong, 0.5)]), np.empty((0, 5))]
    recall, threshold = detection_metrics.recall_at(found, TRUTH, 0.0)
    assert recall == 1 / 3 and threshold == (0.9 + 0.5) / 2


def test_what_lies_in_a_crowd_does_not_count():
    truth, crowd = TRUTH[0][:1], np.array([[0.0, 0.0, 0.5, 0.5]])
    boxes = np.array([[0.1, 0.1, 0.3, 0.2], [0.4, 0.4, 0.5, 0.5], [0.4, 0.4, 0.8, 0.8]])
    kept = detection_metrics.outside(scored(boxes, 0.9, 0.8, 0.7), truth, crowd)
    assert np.array_equal(kept[:, 4], [0.9, 0.7])
    assert detection_metrics.outside(boxes, truth, np.empty((0, 4))) is boxes


def test_nothing_found():
    found = [np.empty((0, 5))] * 2
    assert detection_metrics.average_precision(found, TRUTH)["AP"] == 0.0
    assert detection_metrics.recall_at(found, TRUTH) == (0.0, 1.0)


def test_a_threshold_is_never_inside_a_tie():
    wrong = np.array([[0.6, 0.0, 0.8, 0.1]])
    found = [np.concatenate([scored(TRUTH[0][:1], 0.5), scored(wrong, 0.5)]), np.empty((0, 5))]
    recall, threshold = detection_metrics.recall_at(found, TRUTH, 0.0)
    assert recall == 0.0 and threshold > 0.5


BOX = st.tuples(*[st.floats(0, 0.5)] * 2, *[st.floats(0.05, 0.5)] * 2, st.floats(0.01, 1))


@given(st.lists(st.lists(BOX, max_size=6), min_size=2, max_size=2), st.floats(0, 2))
def test_recall_is_what_its_threshold_gives(drawn: list, allowed: float):
    found = [
        np.array([(x, y, x + w, y + h, s) for x, y, w, h, s in part]).reshape(-1, 5)
        for part in drawn
    ]
    recall, threshold = detection_metrics.recall_at(found, TRUTH, allowed)
    kept = [boxes[boxes[:, 4] >= threshold] for boxes in found]
    right, wrong = detection_metrics.count(kept, TRUTH)
    assert recall == right / 3 and wrong <= allowed * 2 + 1e-9
    assert recall <= detection_metrics.recall_at(found, TRUTH, allowed + 1)[0]
