"""From codec frames to a waveform, at once or frame by frame."""
