"""A run: its file, its stages, the loop, its checkpoints and log."""
