"""Triton loads this file; the model is in `twotower_engines.serving.twotower`."""

from twotower_engines.serving.twotower import TritonPythonModel

__all__ = ["TritonPythonModel"]
