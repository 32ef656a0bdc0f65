"""The demo's pictures and net; ``.ci/run`` runs the demo itself."""

import re
import shlex

import numpy as np
import pytest
import torch
import typer

from penjing.cli import demonstration, main, signs
from penjing.net.profiling import profile


def test_pictures_are_balanced_varied_and_the_same_for_the_same_seed() -> None:
    images, labels = signs.pictures(40, 48, 0)
    assert images.shape == (40, 48, 48, 3) and images.dtype == np.uint8
    assert np.bincount(labels).tolist() == [4] * len(signs.CLASSES)
    assert len({image.tobytes() for image in images}) == 40
    again, _ = signs.pictures(40, 48, 0)
    assert (again == images).all()
    assert not (signs.pictures(40, 48, 1)[0] == images).all()


@pytest.mark.parametrize("name", signs.CLASSES)
def test_every_sign_has_its_own_face(name: str) -> None:
    """Seen from the front, any two signs differ in more than 3 % of the pixels, far beyond noise."""
    faces = {
        each: np.asarray(signs._flat(each).convert("RGB"), dtype=int) for each in signs.CLASSES
    }
    for other in set(signs.CLASSES) - {name}:
        changed = np.abs(faces[name] - faces[other]).max(axis=2) > 60
        assert changed.mean() > 0.03, other


def test_the_net_is_one_a_camera_could_have() -> None:
    net = demonstration.SignNet()
    counted = profile(net, torch.zeros(1, 3, demonstration.SIDE, demonstration.SIDE))
    assert net.eval()(torch.zeros(2, 3, 48, 48)).shape == (2, 10)
    assert 5e5 < counted.params < 8e5 and 4e7 < counted.macs < 7e7


def test_the_next_steps_are_three_commands_that_exist() -> None:
    lines = re.findall(r"^  penjing (.*)$", demonstration.NEXT_STEPS, re.MULTILINE)
    assert len(lines) == 3
    commands = typer.main.get_command(main.app).commands  # type: ignore[attr-defined]
    for line in lines:
        name, *words = shlex.split(line)
        with commands[name].make_context(name, words):
            pass
