"""twotower_engines."""
