"""Triton loads this file; the model is in `twotower_engines.serving.postprocessing`."""

from twotower_engines.serving.postprocessing import TritonPythonModel

__all__ = ["TritonPythonModel"]
