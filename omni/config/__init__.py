"""Configurations: strict reading and faithful writing of `config.json`, and the model families."""

from omni.config.family import Family, KeyNames, register_family
from omni.config.model import OmniConfig
from omni.config.positions import PositionRule

__all__ = ["Family", "KeyNames", "OmniConfig", "PositionRule", "register_family"]
