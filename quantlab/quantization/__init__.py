"""Quantizers as pure functions, default recipes, and the hook that transformers calls."""
