"""Plans: the models that fit on a GPU, and how fast they can be."""
