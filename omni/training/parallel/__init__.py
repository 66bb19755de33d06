"""Training on many processes."""
