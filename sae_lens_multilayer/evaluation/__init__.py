"""Splice-in evaluation and reconstruction metrics."""
