"""The Thinker: the decoder that reads all modalities and writes text."""
