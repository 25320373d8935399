"""Figures of results, the HTML report and its latent browser."""
