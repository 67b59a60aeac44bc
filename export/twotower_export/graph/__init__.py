"""ONNX graphs of the two towers, built directly from a model's sizes."""

from twotower_export.graph.tower import (
    build_context_graph,
    build_denoiser_graph,
    build_refine_graph,
)

__all__ = ["build_context_graph", "build_denoiser_graph", "build_refine_graph"]
