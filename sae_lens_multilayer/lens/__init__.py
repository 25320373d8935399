"""Tuned lenses: one affine map per layer, before the SAE and back after it."""
