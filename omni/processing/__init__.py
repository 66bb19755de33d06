"""From conversations and media files to the model's inputs, and from ids back to text."""
