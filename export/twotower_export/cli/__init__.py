"""The verbs of the exporter."""
