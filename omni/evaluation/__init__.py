"""Scores of a model on a manifest."""
