"""The small net and its images."""

from small_net import net, task

__all__ = ["net", "task"]
