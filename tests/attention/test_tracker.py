"""The tracker follows what moves, keeps its number, and forgets what is gone."""

import numpy as np
import pytest

from penjing.attention.tracker import LOST_AFTER, Tracker

RANDOM = np.random.default_rng(0)
TEXTURE = RANDOM.integers(0, 256, (40, 60, 3), dtype=np.uint8)
GROUND = RANDOM.integers(100, 130, (240, 320, 3), dtype=np.uint8)


def scene(x: int, y: int) -> np.ndarray:
    frame = GROUND.copy()
    frame[y : y + 40, x : x + 60] = TEXTURE
    return frame


def box(x: int, y: int) -> np.ndarray:
    return np.array([[x, y, x + 60, y + 40, 0.9]], np.float32)


def test_a_moving_object_is_followed_between_detections():
    tracker = Tracker()
    tracker.update(scene(40, 60), box(40, 60))
    for step in range(1, 9):
        (track,) = tracker.follow(scene(40 + 4 * step, 60 + 2 * step))
        assert np.allclose(track.box[:4], box(40 + 4 * step, 60 + 2 * step)[0, :4], atol=2)
        assert track.identity == 1
    (track,) = tracker.update(scene(76, 78), box(76, 78))
    assert track.identity == 1 and np.allclose(track.box, box(76, 78)[0])


def test_two_objects_keep_their_numbers_when_detections_change_order():
    tracker = Tracker(flow=False)
    both = np.concatenate([box(10, 10), box(200, 150)])
    first = {track.identity: track.box[0] for track in tracker.update(GROUND, both)}
    tracker.update(GROUND, both[::-1] + np.array([3, 0, 3, 0, 0], np.float32))
    assert {t.identity: t.box[0] for t in tracker.visible()} == {k: v + 3 for k, v in first.items()}


def test_without_flow_objects_go_on_as_they_moved():
    tracker = Tracker(flow=False)
    for step in range(6):
        tracker.update(GROUND, box(20 + 8 * step, 50))
    (track,) = tracker.update(GROUND, box(20 + 8 * 6, 50))
    assert track.identity == 1
    assert abs(track.velocity[0] - 8) < 1


def test_a_still_object_without_texture_stays_where_it_is():
    """Nothing to measure motion by: the detector's jitter must not send it off."""
    tracker, plain = Tracker(), np.full((240, 320, 3), 90, np.uint8)
    tracker.update(plain, box(100, 100))
    for round_ in range(4):
        for _ in range(9):
            tracker.follow(plain)
        tracker.update(plain, box(100 + 2 * (round_ % 2), 100))
    for _ in range(9):
        (track,) = tracker.follow(plain)
    assert np.abs(track.box[:4] - box(100, 100)[0, :4]).max() < 4


def test_corrections_are_spread_over_the_frames_between():
    tracker, plain = Tracker(), np.full((240, 320, 3), 90, np.uint8)
    tracker.update(plain, box(20, 100))
    for step in range(1, 9):
        for _ in range(4):
            tracker.follow(plain)
        (track,) = tracker.update(plain, box(20 + 20 * step, 100))
    assert track.identity == 1
    assert track.velocity[0] == pytest.approx(4, abs=0.5)


def test_what_is_not_seen_again_is_forgotten():
    tracker = Tracker(flow=False)
    tracker.update(GROUND, box(20, 50))
    nothing = np.empty((0, 5), np.float32)
    assert tracker.update(GROUND, nothing) == []
    (back,) = tracker.update(GROUND, box(20, 50))
    assert back.identity == 1
    for _ in range(LOST_AFTER + 1):
        tracker.update(GROUND, nothing)
    (other,) = tracker.update(GROUND, box(20, 50))
    assert other.identity == 2


def test_what_leaves_the_frame_is_gone():
    tracker = Tracker(flow=False)
    for step in range(4):
        tracker.update(GROUND, box(200 + 20 * step, 50))
    assert len(tracker.tracks) == 1
    for _ in range(4):
        tracker.follow(GROUND)
    assert tracker.tracks == []
