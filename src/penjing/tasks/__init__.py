"""Tasks: labelled images, a loss and a score that a model is trained and judged by.

Names are imported when they are first used: a device reads frames and boxes without PyTorch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from penjing import lazy

if TYPE_CHECKING:
    from penjing.tasks.datasets import describe, from_arrays, load
    from penjing.tasks.preprocessing import Preprocessing
    from penjing.tasks.task import Task, evaluate, outputs_of

__all__ = ["Preprocessing", "Task", "describe", "evaluate", "from_arrays", "load", "outputs_of"]

_HOME = {
    "Preprocessing": "preprocessing",
    "Task": "task",
    "describe": "datasets",
    "evaluate": "task",
    "from_arrays": "datasets",
    "load": "datasets",
    "outputs_of": "task",
}

__getattr__ = lazy.attributes(__name__, _HOME)
