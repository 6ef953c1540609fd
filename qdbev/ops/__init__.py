"""The operators a deployed graph keeps as single nodes, and the leaves that quantization swaps; PyTorch is their truth."""
