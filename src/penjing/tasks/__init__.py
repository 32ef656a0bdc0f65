"""What a model is for: data, a loss, a score."""

from penjing.tasks.datasets import from_arrays, load
from penjing.tasks.preprocessing import Preprocessing
from penjing.tasks.task import Task, evaluate, outputs_of

__all__ = ["Preprocessing", "Task", "evaluate", "from_arrays", "load", "outputs_of"]
