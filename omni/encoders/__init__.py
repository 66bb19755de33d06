"""What the Thinker perceives with: log-mel features, the audio encoder and the vision encoder."""
