"""Activations on disk: harvested once, trained on many times."""
