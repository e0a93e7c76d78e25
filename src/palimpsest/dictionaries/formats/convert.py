"""Writing a dictionary in any format, and converting one: the result is read back and compared before it counts."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import NamedTuple

import torch

from palimpsest.artifacts import input_entry
from palimpsest.dictionaries.dictionary import Dictionary
from palimpsest.dictionaries.formats.base import Format
from palimpsest.dictionaries.formats.load import FILES, FORMATS, find_dictionary, load_dictionary
from palimpsest.dictionaries.formats.native import NATIVE
from palimpsest.dictionaries.formats.sources import open_tensors
from palimpsest.dictionaries.native import build, save
from palimpsest.errors import ArtifactError, ConfigError, DictionaryError
from palimpsest.log import progress

WRITABLE = tuple(form.key for form in FORMATS if form.write is not None)
"""Formats that can be written."""

PROBES = 256
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-6}
LOOSE = 0.05


class Converted(NamedTuple):
    """A dictionary that was written in another format.

    Attributes:
        path: The folder.
        source: The format it was in.
        to: The format it is in now.
        lost: What the new format could not keep.
        notes: What reading the old one had to assume.
        site: Where the dictionary reads, which not every format keeps.
        error: Largest relative difference of a reconstruction, of random inputs, read back.
    """

    path: Path
    source: str
    to: str
    lost: list[str]
    notes: list[str]
    site: str | None
    error: float


def convert_dictionary(
    source: str | Path,
    out: str | Path,
    *,
    to: str,
    dtype: torch.dtype | None = None,
    revision: str | None = None,
    site: str | None = None,
    overwrite: bool = False,
) -> Converted:
    """Read a dictionary in any format and write it in another.

    Args:
        source: As `load_dictionary` takes it.
        out: A new or empty folder.
        to: Key of the format, one of `WRITABLE`.
        dtype: Of the weights; as stored when absent.
        revision: Of a hub repository.
        site: Where it reads, for a source that does not say so; kept where the format keeps it.
        overwrite: Replace a dictionary in `out`.

    Raises:
        ConfigError: There is no such format.
        DictionaryError: The source cannot be read, the format cannot hold it, or what was written does not give
            the same reconstructions.
        ArtifactError: `out` holds something else, is the source, or cannot be written.
    """
    format_of(to)
    form, header = find_dictionary(source, revision=revision)
    home = header.file.resolve()
    # In the hub's cache, files are links that lead out of their folder.
    near = header.file.parent.resolve()
    if Path(out).resolve() in (home, *home.parents, near, *near.parents):
        raise ArtifactError(f"{out} holds the dictionary that is converted", fix="Choose another --out")
    if form is NATIVE and near in Path(out).resolve().parents:
        raise ArtifactError(f"{out} is inside the dictionary that is converted", fix="Choose another --out")
    check_free(Path(out), overwrite=overwrite)
    with progress("reading, writing, reading back", 2, "steps") as advance:
        dictionary = load_dictionary(source, dtype=dtype, revision=revision)
        advance()
        if site is not None:
            dictionary.metadata["site"] = site
        if format_of(to) is NATIVE:
            lost = write_dictionary(dictionary, out, overwrite=overwrite, source=source)
            error = _agreed(dictionary, load_dictionary(out), NATIVE)
        else:
            lost, error = _write(dictionary, out, format_of(to), overwrite=overwrite)
        advance()
    return Converted(
        Path(out), form.name, format_of(to).name, lost, list(header.notes), dictionary.site, error
    )


def write_dictionary(
    dictionary: Dictionary,
    path: str | Path,
    *,
    to: str = "palimpsest",
    overwrite: bool = False,
    source: str | Path | None = None,
) -> list[str]:
    """Write a dictionary in a format; the folder appears when all of it is written.

    Args:
        dictionary: What is written.
        path: A new or empty folder.
        to: Key of the format, one of `WRITABLE`.
        overwrite: Replace a dictionary in the folder.
        source: Where it was read, for the manifest of a native folder.

    Returns:
        Sentences on what the format could not keep.

    Raises:
        ConfigError: There is no such format.
        DictionaryError: The format cannot hold this dictionary.
        ArtifactError: The folder holds something else or cannot be written.
    """
    form = format_of(to)
    if form is NATIVE:
        local = source is not None and Path(source).exists()
        save(
            dictionary,
            path,
            overwrite=overwrite,
            inputs={"source": input_entry(str(source))} if local else None,
        )
        return []
    return _write(dictionary, path, form, overwrite=overwrite)[0]


def _write(
    dictionary: Dictionary, path: str | Path, form: Format, *, overwrite: bool
) -> tuple[list[str], float]:
    """What is lost, and how far what was written is from the dictionary when it is read back."""
    folder = Path(path).resolve()
    if folder in (Path.cwd(), *Path.cwd().parents):
        raise ArtifactError(
            f"{path} is or holds the folder that this command runs in", fix="Choose a new folder as --out"
        )
    check_free(folder, overwrite=overwrite)
    assert form.write is not None
    scratch, old = (folder.with_name(f".{folder.name}.{os.getpid()}.{end}") for end in ("partial", "old"))
    try:
        scratch.mkdir(parents=True)
        lost = form.write(dictionary, scratch)
        error = _proved(dictionary, scratch, form)
        # What is there is deleted only after the new one stands in its place.
        if folder.exists():
            folder.rename(old)
        scratch.rename(folder)
    except OSError as error:
        raise ArtifactError(f"Cannot write {folder}", found=error.strerror or error) from error
    finally:
        if old.exists() and not folder.exists():
            old.rename(folder)
        shutil.rmtree(scratch, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)
    return lost, error


def _proved(dictionary: Dictionary, folder: Path, form: Format) -> float:
    """Read back what was written before it takes the place of anything."""
    header = form.header(folder)
    file = open_tensors(header.file)
    weights = form.convert(header, lambda name, axis=None: file.read(name))
    return _agreed(dictionary, build(header.fields, weights, folder), form)


def _agreed(dictionary: Dictionary, again: Dictionary, form: Format) -> float:
    error = compare(dictionary, again)
    allowed = TOLERANCE.get(dictionary.dtype, LOOSE)
    if not error <= allowed:  # NaN is no agreement
        raise DictionaryError(
            f"What was written as {form.name} does not reconstruct as the dictionary does",
            expected=f"a relative difference below {allowed:g}",
            found=f"{error:.3g}",
            fix="Choose another format or a wider type; please report this with the configuration of the source",
        )
    return error


def format_of(key: str) -> Format:
    """The format of a key.

    Raises:
        ConfigError: There is none that can be written.
    """
    for form in FORMATS:
        if form.key == key and form.write is not None:
            return form
    raise ConfigError("There is no such format to write", expected=", ".join(WRITABLE), found=key)


def check_free(folder: Path, *, overwrite: bool) -> None:
    """Refuse a folder that holds something, unless it is a dictionary that may be replaced.

    Raises:
        ArtifactError: Says what is in the way.
    """
    if folder.exists() and not folder.is_dir():
        raise ArtifactError(f"{folder} is a file", expected="a new or empty folder")
    if not folder.exists() or not any(folder.iterdir()):
        return
    if not any(form.matches(folder) for form in FORMATS):
        raise ArtifactError(
            f"{folder} is not empty and holds no dictionary", fix="Choose a new folder as --out"
        )
    if not overwrite:
        raise ArtifactError(f"{folder} already holds a dictionary", fix="Pass --overwrite to replace it")
    files = [path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir()]
    names = sorted(path.relative_to(folder).as_posix() for path in files)
    if others := [name for name in names if name not in (*FILES, "README.md")]:
        raise ArtifactError(
            f"{folder} holds more than a dictionary, and all of it would be deleted",
            found=", ".join(others[:5]),
            fix="Move those files elsewhere, or choose another --out",
        )


@torch.no_grad()
def compare(one: Dictionary, other: Dictionary, *, seed: int = 0) -> float:
    """Largest relative difference of the reconstructions of random inputs, in units of the largest reconstruction.

    The inputs are sums of decoder rows around the bias and noise of the same size, so that latents fire.
    """
    generator = torch.Generator().manual_seed(seed)
    rows = one.W_dec.detach().float().cpu().flatten(1)
    some = torch.randint(len(rows), (PROBES, 8), generator=generator)
    x = (rows[some] * torch.rand(PROBES, 8, 1, generator=generator) * 4).sum(1)
    x = (
        x
        + one.b_dec.detach().float().cpu().flatten()
        + 0.3 * x.std() * torch.randn(x.shape, generator=generator)
    )
    x = x.view(PROBES, one.models, one.d_model)
    made, found = (d.decode(d.encode(x.to(d.device))).float().cpu() for d in (one, other))
    return float((made - found).abs().max() / made.abs().max().clamp_min(1e-12))
