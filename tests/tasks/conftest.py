"""Rectangles to find."""

from rectangles import boxes

__all__ = ["boxes"]
