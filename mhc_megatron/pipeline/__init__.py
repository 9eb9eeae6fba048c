"""Streams between pipeline stages."""
