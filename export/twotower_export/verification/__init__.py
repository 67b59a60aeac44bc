"""What `twotower verify` is made of: two sides that compute the same, and their comparison."""
