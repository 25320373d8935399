"""TopK autoencoder: `reference` defines it, `step` and `sparse` compute it fast."""
