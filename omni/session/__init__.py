"""Conversations over time: sessions, an engine that runs several, live media, and their file."""
