"""Former name of distillation, which belongs to ``penjing.training``; it goes with version 0.2."""

from penjing.training import Distill, distill
from penjing.training.distillation import soft_loss

__all__ = ["Distill", "distill", "soft_loss"]
