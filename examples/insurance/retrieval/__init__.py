"""Chunks, embeddings, and a search that sees only what the asker may see."""
