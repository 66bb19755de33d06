"""The `omni` command, one file for each of its commands; it answers `--help` without loading PyTorch."""
