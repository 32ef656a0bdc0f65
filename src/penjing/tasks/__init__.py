"""Tasks: labelled images, a loss and a score that a model is trained and judged by."""

from penjing.tasks.datasets import describe, from_arrays, load
from penjing.tasks.preprocessing import Preprocessing
from penjing.tasks.task import Task, evaluate, outputs_of

__all__ = ["Preprocessing", "Task", "describe", "evaluate", "from_arrays", "load", "outputs_of"]
