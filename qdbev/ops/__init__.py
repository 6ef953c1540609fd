"""Operators that a deployed graph keeps as single nodes, and modules that quantization replaces; PyTorch defines their results."""
