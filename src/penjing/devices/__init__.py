"""Devices: measure deployed files, and build artifacts with their measurements."""
