"""The verbs of the engines."""
