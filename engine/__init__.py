"""The engine room: TensorRT and TensorRT-RTX build, audit, run and measure what export/ made."""
