"""Triton loads this file; the model is in `twotower_engines.serving.preprocess`."""

from twotower_engines.serving.preprocess import TritonPythonModel

__all__ = ["TritonPythonModel"]
