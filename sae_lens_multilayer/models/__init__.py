"""Loaded language models of every kind, their shapes and how they are loaded."""
