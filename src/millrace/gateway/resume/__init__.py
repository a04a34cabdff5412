"""Streams: how they are buffered, and resumed on another replica."""
