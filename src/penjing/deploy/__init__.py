"""From a compressed model to the file a device runs, and what that file measures."""
