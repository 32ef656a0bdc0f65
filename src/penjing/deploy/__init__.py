"""From a compressed model to the file a device runs, and what that file measures."""

from penjing.deploy.export import export

__all__ = ["export"]
