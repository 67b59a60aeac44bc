"""From requests to blocks."""
