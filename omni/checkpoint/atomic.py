"""A folder written all or nothing: see `omni.config.writing`, where the lower rooms find it too."""

from omni.config.writing import atomic_folder, recover

__all__ = ["atomic_folder", "recover"]
