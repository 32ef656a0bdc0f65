"""The mathematics of quantization: grids, ranges, rounding, correction."""
