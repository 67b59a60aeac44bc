"""Triton loads this file; the model is in `twotower_engines.serving.postprocess`."""

from twotower_engines.serving.postprocess import TritonPythonModel

__all__ = ["TritonPythonModel"]
