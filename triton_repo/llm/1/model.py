"""Triton loads this file; the model is in `twotower_engines.serving.llm`."""

from twotower_engines.serving.llm import TritonPythonModel

__all__ = ["TritonPythonModel"]
