"""Triton loads this file; the model is in `twotower_engines.serving.preprocessing`."""

from twotower_engines.serving.preprocessing import TritonPythonModel

__all__ = ["TritonPythonModel"]
