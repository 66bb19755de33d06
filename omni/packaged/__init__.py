"""Models that come with the package: a random toy, and omni-nano, which is trained."""
