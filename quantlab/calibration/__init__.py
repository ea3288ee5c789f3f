"""Quantize whole checkpoints, tensor by tensor."""
