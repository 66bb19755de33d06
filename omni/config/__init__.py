"""Configurations: strict reading and faithful writing of `config.json`, and the model families."""
