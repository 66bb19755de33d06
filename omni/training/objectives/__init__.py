"""What a model learns: losses, and the passes through the model that they look at."""
