"""Run in a process of its own: the memory one inference takes, in bytes, on standard output.

It imports nothing but the runtime and NumPy, so that what it measures is what a device needs.
"""

import sys
from pathlib import Path

import numpy as np
import onnxruntime as ort


def main(path: str) -> None:
    """Load ``path``, run it three times on an image of zeros, print the process's peak memory."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.inter_op_num_threads = 1
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    image = session.get_inputs()[0]
    shape = [size if isinstance(size, int) else 1 for size in image.shape]
    kind = np.uint8 if image.type == "tensor(uint8)" else np.float32
    for _ in range(3):
        session.run(None, {image.name: np.zeros(shape, kind)})
    print(_peak_bytes())


def _peak_bytes() -> int:
    status = Path("/proc/self/status")
    if status.exists():
        # Not ru_maxrss: on Linux a new process starts with its parent's peak.
        line = next(row for row in status.read_text().splitlines() if row.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # macOS counts in bytes


if __name__ == "__main__":
    main(sys.argv[1])
