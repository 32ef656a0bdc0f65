"""Former names of modules that have moved to ``targets`` and ``devices``; they go with version 0.2."""

import sys
import warnings

from penjing.devices import artifact
from penjing.devices import measurement as measure
from penjing.targets.onnxruntime import export

__all__ = ["artifact", "export", "measure"]

warnings.warn(
    "penjing.deploy has moved: use penjing.targets.onnxruntime.export, penjing.devices.artifact and "
    "penjing.devices.measurement.",
    DeprecationWarning,
    stacklevel=2,
)
sys.modules.update({f"{__name__}.{name}": globals()[name] for name in __all__})
