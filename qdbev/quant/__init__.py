"""Quantization of leaf modules: fake quantizers, swapping by policy, calibration, export form and size. Knows no network."""
