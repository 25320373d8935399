"""The multi-layer SAE, its configs and its single-hook views."""
