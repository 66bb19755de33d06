"""The speech codec as a thing to train, and codes of recorded speech."""
