"""The one training loop, its settings, and distillation, which is a loss in it."""

from penjing.training.loop import (
    TrainResult,
    TrainSettings,
    save_weights,
    seconds_per_epoch,
    train,
)

__all__ = ["TrainResult", "TrainSettings", "save_weights", "seconds_per_epoch", "train"]
