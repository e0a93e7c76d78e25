"""Constant-vector adapters for other tools: lm-evaluation-harness' steered models, llama.cpp, plain tensors."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from palimpsest.artifacts import disk
from palimpsest.errors import ConfigError
from palimpsest.tune.export.formats import FORMATS
from palimpsest.tune.export.vectors import read_vectors


class Exported(NamedTuple):
    """What was written.

    Attributes:
        path: The file.
        to: Its format.
        sites: Sites that it edits.
        notes: In what it differs from the adapter.
    """

    path: Path
    to: str
    sites: list[str]
    notes: list[str]


def export_adapter(
    adapter_folder: str | Path, to: str, out: str | Path, *, overwrite: bool = False
) -> Exported:
    """Write an adapter whose component adds one constant vector at each site.

    Args:
        adapter_folder: The adapter; its base's configuration and, for bias, its dictionaries are read too.
        to: `steered` (lm-evaluation-harness' `--model steered`, a `.pt` of plain tensors), `gguf` (a control vector of
            llama.cpp) or `vector` (safetensors, a tensor for each site).
        out: The file.
        overwrite: Replace it if it is there.

    Raises:
        ConfigError: The adapter is no constant vector, the format cannot hold its sites, the `gguf` package is absent,
            or the file's name does not fit the format.
        DictionaryError: A dictionary is absent or another one than the adapter was trained with.
    """
    path = Path(out)
    if to not in FORMATS:
        raise ConfigError("Unknown format", expected=" | ".join(FORMATS), found=repr(to))
    form = FORMATS[to]
    if path.suffix not in form.suffixes:
        raise ConfigError(
            f"The name {path.name} does not fit the format {to}",
            expected=f"a file {' or '.join(form.suffixes)}",
        )
    if path.exists() and (path.is_dir() or not overwrite):
        raise ConfigError(f"{path} exists", fix="Name another file, or pass --overwrite")
    vectors = read_vectors(Path(adapter_folder))
    notes = form.check(vectors)
    disk.make_folder(path.parent)
    with disk.replacing(path) as temporary:
        form.write(vectors, temporary)
    return Exported(path, to, sorted(vectors.by_site), vectors.notes + notes)


__all__ = ["FORMATS", "Exported", "export_adapter"]
