"""Exploration: search the frontier of smaller and faster models, and keep the study on disk."""

from penjing.exploration.budget import Budget
from penjing.exploration.search import explore
from penjing.exploration.study import Point, Study

__all__ = ["Budget", "Point", "Study", "explore"]
