"""From what the user wrote, a folder, a Hub id or the name of a packaged checkpoint, to files on this machine."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from omni.config.keywords import is_misspelt
from omni.config.writing import recover

CONFIG_FILES = ("config.json",)
PROCESSOR_FILES = ("*.json", "*.txt", "*.jinja", "*.model")  # tokenizer, chat template, values of the preprocessors
# also weights; of pickles only the voices, which are read as tensors and nothing else
CHECKPOINT_FILES = (*PROCESSOR_FILES, "*.safetensors", "spk_dict.pt")
PACKAGED = {
    "omni-nano": Path(__file__).resolve().parents[1] / "packaged" / "nano_data"
}  # checkpoints that come with omni
_HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")


def locate(
    folder_or_hub_id: str | Path,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    files: Sequence[str] = CHECKPOINT_FILES,
) -> Path:
    """An existing folder as it is; a checkpoint that comes with omni (`PACKAGED`) by its name; otherwise the Hub
    repository of that id, its `files` downloaded or from the cache.

    Where config.json alone is asked for (`CONFIG_FILES`), an existing JSON file is returned as it is. What cannot be a
    Hub id fails at once. Raises FileNotFoundError when there is neither, OSError when the download fails, ValueError
    when it is a file, TypeError for anything else.
    """
    if not isinstance(folder_or_hub_id, (str, Path)):
        raise TypeError(f"pass a checkpoint folder or a Hub id such as org/name, got {folder_or_hub_id!r}")
    name = str(folder_or_hub_id)
    try:
        path = Path(folder_or_hub_id).expanduser()
    except RuntimeError as error:  # of a user that this machine does not have
        raise FileNotFoundError(f"folder {name!r} does not exist: {error}") from error
    if name and path.parent.is_dir():
        recover(path.parent if path.suffix == ".json" else path)
    if name and path.is_dir():
        return path
    if name and path.exists():
        if files == CONFIG_FILES:
            return path
        raise ValueError(f"{path} is a file; pass the folder that holds config.json and the weights")
    if name in PACKAGED:
        return PACKAGED[name]
    for packaged in PACKAGED:
        if is_misspelt(name.replace("_", "-").replace(" ", "-"), packaged):
            raise FileNotFoundError(f"there is no folder {name!r} and no such checkpoint; did you mean {packaged!r}?")
    if isinstance(folder_or_hub_id, Path) or name.endswith(".json") or not _HUB_ID.fullmatch(name):
        raise FileNotFoundError(
            f"folder {name!r} does not exist; pass a checkpoint folder or a Hub id such as org/name"
        )
    from huggingface_hub import snapshot_download  # imports for a second, which a folder need not wait for

    try:
        folder = snapshot_download(
            name,
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            allow_patterns=list(files),
        )
    except FileNotFoundError as error:  # neither reachable nor in the cache
        where = "in the local cache" if local_files_only else "on the Hub, which may be out of reach"
        raise FileNotFoundError(
            f"{name!r} is no folder here and was not found {where}; check the name, or download it and pass its folder"
        ) from error
    except Exception as error:  # the client's own kinds: no such repository or revision, no access, network
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise OSError(
            f"{name!r} could not be downloaded from the Hub: {reason.rstrip('.')}; check the name, the revision and "
            "the token, or download it and pass its folder"
        ) from error
    return Path(folder)
