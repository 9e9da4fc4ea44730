"""The embedded world: a renderer, its captions and flaws, an annotator, small encoders, and how the shipped weights were made."""
