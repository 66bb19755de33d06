"""Training: losses, data, stages and the loop, for every part of a model. Imported only when asked for."""
