"""What fits where, and how fast it can be."""
