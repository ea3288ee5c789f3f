"""Measure models: perplexity, divergence, plots."""
