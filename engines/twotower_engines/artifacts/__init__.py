"""Artifacts on disk: weights and tokenizers, read for the engines."""
