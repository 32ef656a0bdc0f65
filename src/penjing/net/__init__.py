"""PyTorch nets: their layers, norms, coupled channels, costs, and statistics of calibration."""
