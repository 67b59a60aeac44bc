"""What lies on disk: bundles, engine sets, weights, tokenizers."""
