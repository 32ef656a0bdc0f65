"""Rectangles to find, and a detector that finds them."""

from rectangles import boxes, detector, draw

__all__ = ["boxes", "detector", "draw"]
