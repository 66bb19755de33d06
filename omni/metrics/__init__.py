"""Scores of text, speech and codes, and how far two models agree."""
