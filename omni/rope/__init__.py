"""Rotary embeddings and the positions they rotate by."""
