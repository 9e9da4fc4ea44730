"""The embedded world: a renderer with captions and flaws, an annotator, small encoders, and the training of
the shipped weights."""
