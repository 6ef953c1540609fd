"""Builds TensorRT and TensorRT-RTX engines from the ONNX files of export/, audits, runs and measures them."""
