"""Adapters: low-rank updates of a checkpoint's linear weights, as data, as peft's files, and fused into the weights."""
