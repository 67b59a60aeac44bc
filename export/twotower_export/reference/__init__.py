"""The towers and the loop around them in PyTorch: what graphs are compared with."""
