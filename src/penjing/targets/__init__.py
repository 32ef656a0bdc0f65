"""Ways to run a net on a device: file formats with their kernels."""
