"""Triton loads this file; the model is in `twotower_engines.serving.generate`."""

from twotower_engines.serving.generate import TritonPythonModel

__all__ = ["TritonPythonModel"]
