"""Modules that have moved are found under their former names."""

import importlib
import sys

import pytest

from penjing.devices import artifact, measurement
from penjing.targets.onnxruntime import export
from penjing.training import Distill


def test_deploy_is_found_and_says_where_it_went() -> None:
    sys.modules.pop("penjing.deploy", None)
    with pytest.warns(DeprecationWarning, match=r"use penjing\.targets\.onnxruntime\.export"):
        importlib.import_module("penjing.deploy")
    for name, module in (("artifact", artifact), ("measure", measurement), ("export", export)):
        assert importlib.import_module(f"penjing.deploy.{name}") is module


def test_distillation_is_found_among_techniques() -> None:
    assert importlib.import_module("penjing.techniques.distill").Distill is Distill
