"""One thread a test: tests run side by side, and threads that wait for a core burn the others'."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
