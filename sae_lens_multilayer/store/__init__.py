"""The store of activations: reads tokens, harvests every layer, mixes and serves."""
