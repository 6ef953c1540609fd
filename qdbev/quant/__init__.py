"""Quantization of any network: fake quantizers, quantized layers chosen by a policy, calibration, export, packing and sizes."""
