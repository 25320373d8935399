"""Lenses: an invertible affine map per layer, before the SAE and back after it.

Tuned lenses (`fit`), maps in closed form (`closed_form`) and Jacobian lenses
(`jacobian`) are all a `LayerLens`.
"""
