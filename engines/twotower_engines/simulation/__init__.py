"""The scheduler on engines that only cost time."""
