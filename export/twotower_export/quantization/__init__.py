"""Quantized checkpoints: which matrices become narrow, their codes and scales, the files."""
