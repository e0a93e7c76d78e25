"""Formats on disk: which reader a folder needs, and where a folder comes from."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from palimpsest.dictionaries import native, saelens
from palimpsest.dictionaries.dictionary import Dictionary
from palimpsest.errors import DictionaryError


class Format(NamedTuple):
    """A layout of files.

    Attributes:
        name: As shown to the reader.
        files: What to fetch of a hub repository.
        matches: Whether a folder looks like it; must not raise.
        read: Folder, device and dtype to a dictionary.
    """

    name: str
    files: tuple[str, ...]
    matches: Callable[[Path], bool]
    read: Callable[[Path, torch.device | str, torch.dtype | None], Dictionary]


FORMATS: list[Format] = [
    Format(
        "palimpsest",
        ("manifest.json", native.CONFIG_FILE, native.WEIGHTS_FILE),
        native.matches,
        native.read,
    ),
    Format(
        "SAELens",
        (saelens.CONFIG_FILE, saelens.WEIGHTS_FILE, saelens.SCALER_FILE),
        saelens.matches,
        saelens.read,
    ),
]
"""Tried in this order; a further format is one more entry."""


def load_dictionary(
    path: str | Path,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    revision: str | None = None,
) -> Dictionary:
    """Read a dictionary in any format that is known, detected from the files of its folder.

    Args:
        path: A local folder, or a hub id `owner/name`, with `/folder` behind it where a repository holds
            several. The hub is asked only when there is no such folder; HF_HUB_OFFLINE is respected.
        device: Where the weights go.
        dtype: Of the weights; as stored when absent (float16 is widened to float32).
        revision: Of the hub repository.

    Returns:
        The dictionary, for inference: no gradients.

    Raises:
        DictionaryError: There is nothing readable there; says what is missing.
        ArtifactError: A native folder that is unfinished or was edited.
    """
    folder = Path(path)
    if not folder.exists():
        folder = _fetch(str(path), revision)
    if not folder.is_dir():
        raise DictionaryError(f"{path} is a file", expected="the folder that holds the dictionary")
    for form in FORMATS:
        if form.matches(folder):
            return form.read(folder, device, dtype)
    if native.is_running(folder):
        raise DictionaryError(
            f"The training of {path} has not finished", fix="Run the command that writes it with --resume"
        )
    names = sorted(item.name for item in folder.iterdir())
    raise DictionaryError(
        f"{path} holds no dictionary in a known format",
        expected=" or ".join(f"{form.name} ({', '.join(form.files[:2])})" for form in FORMATS),
        found=", ".join(names[:8]) or "an empty folder",
    )


def _fetch(name: str, revision: str | None) -> Path:
    """Download the files of a hub repository, or say why there is nothing to download."""
    parts = name.split("/")
    if len(parts) < 2 or not all(parts) or name.startswith((".", "~")):
        raise DictionaryError(
            f"There is no folder {name}", expected="a local folder or a hub id such as owner/name"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    repo, inside = "/".join(parts[:2]), "/".join(parts[2:])
    wanted = [f"{inside}/{file}" if inside else file for form in FORMATS for file in form.files]
    try:
        root = snapshot_download(repo, revision=revision, allow_patterns=wanted)
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise DictionaryError(
            f"There is no folder {name} and the hub gave nothing of that name",
            found=str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__,
            fix="Check the path; offline, only repositories that were downloaded before can be read",
        ) from error
    folder = Path(root) / inside
    if not folder.is_dir():
        raise DictionaryError(f"The hub repository {repo} holds no dictionary in {inside or 'its root'}")
    return folder
