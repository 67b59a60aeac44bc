"""From a bundle to an engine set."""
