"""Merge models: configs, methods as pure functions of tensors, and the merge that streams them."""
