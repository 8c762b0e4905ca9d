"""Streams: the sans-IO engine of one established session (`session` is its face)."""
