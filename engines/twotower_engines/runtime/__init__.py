"""Loaded engines: one interface, and the runtimes behind it."""
