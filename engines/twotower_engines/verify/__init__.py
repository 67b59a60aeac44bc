"""Engines compared with a reference, and tested by themselves."""
