"""Models by name: from torchvision, timm, the reference nets or a user's file; and their weights."""

from penjing.models.loading import load, preprocessing
from penjing.models.renormalized import renormalized
from penjing.models.weights import load_weights, stored_preprocessing

__all__ = ["load", "load_weights", "preprocessing", "renormalized", "stored_preprocessing"]
