"""Building blocks that the encoders, the Thinker, the Talker and Code2Wav share."""
