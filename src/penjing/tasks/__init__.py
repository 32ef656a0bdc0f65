"""What a model is for: data, a loss, a score."""

from penjing.tasks.datasets import describe, from_arrays, load
from penjing.tasks.preprocessing import Preprocessing
from penjing.tasks.task import Task, evaluate, outputs_of

__all__ = ["Preprocessing", "Task", "describe", "evaluate", "from_arrays", "load", "outputs_of"]
