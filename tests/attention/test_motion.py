"""The gate opens for what moves, not for the light, and never stays shut for ever."""

import numpy as np

from penjing.attention import Motion
from penjing.attention.motion import Gate

RANDOM = np.random.default_rng(0)
GROUND = RANDOM.integers(60, 140, (240, 320, 3), dtype=np.uint8)


def still(noise: float = 2.0, light: float = 0.0) -> np.ndarray:
    frame = GROUND + RANDOM.normal(light, noise, GROUND.shape)
    return np.clip(frame, 0, 255).astype(np.uint8)


def test_the_first_frame_is_looked_at():
    assert Gate(Motion())(still())


def test_noise_and_light_are_no_motion():
    gate = Gate(Motion(heartbeat=1000))
    gate(still())
    assert not any(gate(still()) for _ in range(20))
    assert not any(gate(still(light=25.0)) for _ in range(5))


def test_an_object_is_motion():
    gate = Gate(Motion(heartbeat=1000))
    for _ in range(5):
        gate(still())
    frame = still()
    frame[100:130, 50:110] = 250
    assert gate(frame)


def test_what_stays_becomes_background():
    gate = Gate(Motion(heartbeat=1000, memory=5))
    gate(still())
    parked = GROUND.copy()
    parked[100:130, 50:110] = 250
    opened = [gate(parked) for _ in range(40)]
    assert opened[0] and not opened[-1]


def test_the_heartbeat_opens_it_regularly():
    gate = Gate(Motion(heartbeat=7))
    frame = still()
    opened = [gate(frame) for _ in range(22)]
    assert [index for index, value in enumerate(opened) if value] == [0, 7, 14, 21]


def test_another_camera_size_starts_anew():
    gate = Gate(Motion())
    gate(still())
    assert gate(np.zeros((300, 320, 3), np.uint8))
