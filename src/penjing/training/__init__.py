"""Training: the loop, its settings and checkpoints, and knowledge distillation."""

from penjing.training.checkpoints import save_weights
from penjing.training.loop import TrainResult, distill, seconds_per_epoch, train
from penjing.training.settings import Distill, TrainSettings

__all__ = [
    "Distill",
    "TrainResult",
    "TrainSettings",
    "distill",
    "save_weights",
    "seconds_per_epoch",
    "train",
]
