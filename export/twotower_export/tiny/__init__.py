"""The tiny model: its checkpoints, its corpus and tokenizer, its training."""
