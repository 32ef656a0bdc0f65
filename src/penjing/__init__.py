"""penjing: make a trained vision model small and fast enough for a camera device, measured.

Names are imported when they are first used, so that ``import penjing`` costs nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from penjing import lazy

if TYPE_CHECKING:
    from penjing.container import inspect, pack, unpack
    from penjing.errors import PenjingError
    from penjing.exploration import Budget, Study
    from penjing.exploration.search import explore
    from penjing.models import load as load_model
    from penjing.net.profiling import profile
    from penjing.recipe import Recipe, compress
    from penjing.recipe import load as load_recipe
    from penjing.targets.onnxruntime.export import export
    from penjing.tasks import Task, from_arrays
    from penjing.tasks import load as load_task
    from penjing.training import TrainSettings, train

__version__ = "0.1.0"

_HOME = {
    "Budget": "exploration",
    "PenjingError": "errors",
    "Recipe": "recipe",
    "Study": "exploration",
    "Task": "tasks",
    "TrainSettings": "training",
    "compress": "recipe",
    "explore": "report.live",
    "export": "targets.onnxruntime.export",
    "from_arrays": "tasks",
    "inspect": "container",
    "load_model": "models:load",
    "load_recipe": "recipe:load",
    "load_task": "tasks:load",
    "pack": "container",
    "profile": "net.profiling",
    "train": "training",
    "unpack": "container",
}

__all__ = [
    "Budget",
    "PenjingError",
    "Recipe",
    "Study",
    "Task",
    "TrainSettings",
    "compress",
    "explore",
    "export",
    "from_arrays",
    "inspect",
    "load_model",
    "load_recipe",
    "load_task",
    "pack",
    "profile",
    "train",
    "unpack",
]

__getattr__ = lazy.attributes(__name__, _HOME)
