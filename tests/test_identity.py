"""What makes two models, or two losses, different; and that other processes find the same."""

from __future__ import annotations

import copy
import functools
import importlib
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from penjing import identity
from penjing.identity import UnidentifiedError

WEIGHT = torch.tensor([1.0, 2.0])


class Net(nn.Module):
    """Has all that a module may compute with."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(3, 3)
        self.act: nn.Module = nn.ReLU()
        self.register_buffer("kept", torch.ones(2))
        self.register_buffer("passing", torch.ones(2), persistent=False)
        self.plain = torch.ones(2)
        self.settings = {"scale": 2.0, "sizes": (1, 2), "names": {"a", "b"}}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.act(self.linear(x)) * self.settings["scale"]


class Other(Net):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.act(self.linear(x)) + self.settings["scale"]


def share(net: Net) -> None:
    net.linear.bias = nn.Parameter(net.linear.weight[0])


CHANGES: dict[str, Callable[[Any], Any]] = {
    "a weight": lambda net: net.linear.weight.data[0, 0].add_(1e-6),
    "a buffer": lambda net: net.kept[0].add_(1),
    "a buffer that is not saved": lambda net: net.passing[0].add_(1),
    "a plain tensor": lambda net: net.plain[0].add_(1),
    "a setting": lambda net: net.settings.update(scale=3.0),
    "a module": lambda net: setattr(net, "act", nn.Sigmoid()),
    "a module's setting": lambda net: setattr(net, "act", nn.ReLU(inplace=True)),
    "a hook": lambda net: net.act.register_forward_hook(lambda *_: None),
    "what is trained": lambda net: net.linear.requires_grad_(False),
    "the code": lambda net: setattr(net, "__class__", Other),
    "a method of the instance": lambda net: setattr(net, "forward", torch.relu),
}
VALUES = {"a weight", "a buffer", "a buffer that is not saved", "what is trained"}


@pytest.mark.parametrize("change", CHANGES)
def test_models_that_differ_in_one_thing(change):
    first, second = Net(), Net()
    assert identity.of(first) == identity.of(second) == identity.of(copy.deepcopy(first))
    assert identity.structure(first) == identity.structure(second)
    CHANGES[change](second)
    assert identity.of(first) != identity.of(second)
    alike = identity.structure(first) == identity.structure(second)
    assert alike is (change in VALUES)


def test_shared_weights_are_not_equal_ones():
    first, second = (nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)) for _ in range(2))
    second.load_state_dict(first.state_dict())
    for net in (first, second):
        net[1].load_state_dict(net[0].state_dict())
    assert identity.of(first) == identity.of(second)
    second[1].weight = second[0].weight
    assert identity.structure(first) != identity.structure(second)


def loss_of(factor: float, weight: Any = None) -> Callable:
    return lambda output, target: F.cross_entropy(output, target, weight) * factor


def helped(output, target):
    return helper(output) + WEIGHT.sum()


def helper(output):
    return output.sum()


def default(output, target, factor=2.0):
    return output.sum() * factor


class Loss:
    def __init__(self, factor: float) -> None:
        self.factor = factor

    def __call__(self, output: Any, target: Any) -> Any:
        return output.sum() * self.factor

    def method(self, output: Any, target: Any) -> Any:
        return output.sum()


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (loss_of(1.0), loss_of(2.0)),
        (loss_of(1.0, torch.ones(2)), loss_of(1.0, torch.zeros(2))),
        (lambda output, target: output.sum(), lambda output, target: output.mean()),
        (lambda output, target: output * 2, lambda output, target: output * 3),
        (Loss(1.0), Loss(2.0)),
        (Loss(1.0).method, Loss(2.0).method),
        (functools.partial(default, factor=1.0), functools.partial(default, factor=2.0)),
        (np.ones(3), np.ones(3, np.float32)),
        (nn.CrossEntropyLoss(), nn.CrossEntropyLoss(label_smoothing=0.1)),
    ],
)
def test_losses_that_differ(one, other):
    assert identity.of(one) == identity.of(one) != identity.of(other)


def test_one_code_is_one_loss():
    assert identity.of(loss_of(1.0)) == identity.of(loss_of(1.0))
    assert identity.of(Loss(1.0)) == identity.of(Loss(1.0))


def test_what_the_code_names_counts(monkeypatch):
    before = identity.of(helped), identity.of(default)
    monkeypatch.setattr(sys.modules[__name__], "helper", lambda output: output.mean())
    changed = identity.of(helped)
    assert changed != before[0]
    monkeypatch.setattr(sys.modules[__name__], "WEIGHT", torch.zeros(2))
    assert identity.of(helped) != changed
    monkeypatch.setattr(default, "__defaults__", (3.0,))
    assert identity.of(default) != before[1]


class Locked:
    def __init__(self, name: str | None = None) -> None:
        self.lock = threading.Lock()
        if name:
            self.name = name

    def __call__(self, output: Any, target: Any) -> Any:
        return output


def test_what_cannot_be_identified_needs_a_name():
    with pytest.raises(UnidentifiedError, match=r"A _thread\.lock cannot be told from another"):
        identity.of(Locked())
    held = Locked()
    with pytest.raises(UnidentifiedError):
        identity.of(lambda output, target: held(output, target))
    assert identity.of(Locked("a")) == identity.of(Locked("a")) != identity.of(Locked("b"))


def test_a_cycle_has_an_end():
    first: list = [1]
    first.append(first)
    second: list = [2]
    second.append(second)
    assert identity.of(first) == identity.of(first) != identity.of(second)


PRINT = """
import sys
sys.path.insert(0, sys.argv[1])
import test_identity as t
from penjing import identity
print(identity.of(t.Net(), t.helped, t.loss_of(2.0), {"a", "b", "c"}, t.Loss(1.0)).hex())
"""


def test_every_process_finds_the_same():
    found = [
        subprocess.run(
            [sys.executable, "-c", PRINT, str(Path(__file__).parent)],
            env=os.environ | {"PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    ]
    assert found[0] == found[1] and len(found[0]) == 65


class Slotted:
    __slots__ = ("factor",)

    def __init__(self, factor: float) -> None:
        self.factor = factor

    def __call__(self, output: Any, target: Any) -> Any:
        return output.sum() * self.factor


def test_a_class_with_slots():
    assert identity.of(Slotted(1.0)) == identity.of(Slotted(1.0)) != identity.of(Slotted(2.0))


RECORD = "Metadata-Version: 2.1\nName: thing\nVersion: 1.0\n"
LOSS = "__version__ = '{}'\ndef loss(a, b): return {}\nclass Loss:\n    factor = {}\n"


@pytest.fixture
def imported(tmp_path, monkeypatch) -> Callable[[str], bytes]:
    """The identity of what a module ``thing`` in the folder ``code`` defines; ``site`` is on the
    path, too."""
    for name in ("code", "site"):
        (tmp_path / name).mkdir()
        monkeypatch.syspath_prepend(tmp_path / name)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)

    def identify(code: str) -> bytes:
        (tmp_path / "code" / "thing.py").write_text(code)
        for name in ("_installed", "_homes", "_distributions", "_version"):
            getattr(identity, name).cache_clear()
        importlib.invalidate_caches()
        monkeypatch.delitem(sys.modules, "thing", raising=False)
        thing = importlib.import_module("thing")
        return identity.of(thing.loss, thing.Loss())

    return identify


def record(folder: Path) -> None:
    """Say in ``folder`` that a package ``thing`` was installed there."""
    kept = folder / "thing-1.0.dist-info"
    kept.mkdir()
    (kept / "METADATA").write_text(RECORD)
    (kept / "top_level.txt").write_text("thing\n")


def test_a_package_installed_anywhere_is_known_by_its_version(tmp_path, imported):
    assert imported(LOSS.format("1.0", 1, 1)) != imported(LOSS.format("1.0", 2, 2))
    record(tmp_path / "code")
    assert imported(LOSS.format("1.0", 1, 1)) == imported(LOSS.format("1.0", 2, 2))
    assert imported(LOSS.format("1.0", 1, 1)) != imported(LOSS.format("2.0", 1, 1))


def test_the_code_of_an_editable_package_is_read(tmp_path, imported):
    record(tmp_path / "site")
    assert imported(LOSS.format("1.0", 1, 1)) != imported(LOSS.format("1.0", 2, 2))
