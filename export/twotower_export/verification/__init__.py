"""The parts of `twotower verify`: two sides that compute the same, and their comparison."""
