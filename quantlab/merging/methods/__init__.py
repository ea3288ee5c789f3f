"""Merge methods: pure functions of one tensor of several models, each a row of a table that says what it needs."""
