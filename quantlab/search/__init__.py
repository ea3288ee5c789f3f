"""Searches whose objective is a measurement: which tensor gets how many bits."""
