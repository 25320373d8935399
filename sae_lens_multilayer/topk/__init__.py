"""The TopK kernel: `reference` is the definition, `sparse` the fast path."""
