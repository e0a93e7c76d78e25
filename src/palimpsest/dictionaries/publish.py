"""Publishing a dictionary: a card that says what it is, and the upload, which happens only when it is asked for."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from palimpsest.dictionaries.dictionary import Dictionary
from palimpsest.dictionaries.formats.convert import write_dictionary
from palimpsest.dictionaries.native import build
from palimpsest.errors import ConfigError, DictionaryError
from palimpsest.hub import hub_errors

LICENCE = re.compile(r"[a-z0-9][a-z0-9.+-]*")
LOCAL = re.compile(r"[/~\\]|\.\.?[/\\]|[A-Za-z]:\\")
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
READS = {
    "base": "the activations of one model",
    "tuned": "the activations of the fine-tuned model",
    "diff": "the difference of the activations, tuned minus base",
    "pair": "the activations of both models at once, base first (a crosscoder)",
}
ORIGIN = (
    "model",
    "base",
    "tuned",
    "revision",
    "tuned_revision",
    "site",
    "corpus",
    "tokens",
    "part_of",
    "format",
)
FIGURES = ("metrics", "evaluation")


def push_dictionary(
    dictionary: Dictionary,
    repo_id: str,
    *,
    private: bool = True,
    token: str | None = None,
    licence: str | None = None,
    to: str = "palimpsest",
) -> str:
    """Upload a dictionary with a card to the Hugging Face hub.

    Paths of this machine in its metadata are cut to their last part.

    Args:
        dictionary: What is uploaded.
        repo_id: The repository, `owner/name`; made where it does not exist.
        private: Of a new repository.
        token: Of the hub; the stored one when absent.
        licence: Identifier of the licence for the card, as in `apache-2.0`; without one the card says so.
        to: Format of the files: palimpsest, or one that other tools read, as in `sae-lens`.

    Returns:
        The address of the commit.

    Raises:
        ConfigError: The licence is no identifier.
        DictionaryError: The format cannot hold the dictionary, or the hub refuses or cannot be reached.
    """
    from huggingface_hub import HfApi

    if licence is not None and not LICENCE.fullmatch(licence):
        raise ConfigError(
            "The licence is no identifier", expected="as in apache-2.0 or cc-by-4.0", found=licence
        )
    public = with_metadata(dictionary, without_paths(dictionary.metadata))
    api = HfApi(token=token)
    with TemporaryDirectory() as scratch:
        folder = Path(scratch) / "dictionary"
        lost = write_dictionary(public, folder, to=to)
        (folder / "README.md").write_text(
            card(public, repo_id, licence=licence, to=to, lost=lost), encoding="utf-8"
        )
        try:
            api.create_repo(repo_id, private=private, exist_ok=True)
            return str(api.upload_folder(repo_id=repo_id, folder_path=folder))
        except hub_errors() as error:
            raise DictionaryError(
                f"Cannot upload to {repo_id}",
                found=f"{type(error).__name__}: {error}",
                fix="Check the name, the network and the token; the dictionary itself is saved",
            ) from error


def card(
    dictionary: Dictionary,
    repo_id: str,
    *,
    licence: str | None = None,
    to: str = "palimpsest",
    lost: list[str] | None = None,
) -> str:
    """The model card: what the dictionary reads, where it came from, how well it does, how to load it."""
    about = dictionary.metadata
    shape = f"{dictionary.n_latents:,} latents, {dictionary.activation}, width {dictionary.d_model}"
    facts = {
        **{name: value for name, value in dictionary.describe().items() if name != "metadata"},
        **{name: about[name] for name in ORIGIN if about.get(name) is not None},
    }
    parts = [
        _front(about, licence, to),
        f"# {plain_text(repo_id)}\n",
        f"A sparse dictionary ({plain_text(shape)}). It reads {READS[dictionary.view]}"
        + (f" at `{plain_text(dictionary.site)}`.\n" if dictionary.site else "; its site is not recorded.\n"),
        fact_table("What it is", facts),
        fact_table("How it was trained", _flat(about.get("recipe"))),
        *(fact_table(f"Figures: {name}", _flat(about.get(name))) for name in FIGURES),
        "## Licence\n\n" + (f"`{licence}`\n" if licence else "None was given by whoever uploaded it.\n"),
        _how(repo_id, to),
    ]
    if lost:
        parts.append("## Not in this format\n\n" + "".join(f"- {plain_text(line)}\n" for line in lost))
    return "\n".join(part for part in parts if part)


def with_metadata(dictionary: Dictionary, metadata: Mapping[str, Any]) -> Dictionary:
    """The same weights under other metadata; memory is shared."""
    fields = dictionary.describe()
    del fields["metadata"], fields["dtype"]
    return build(fields, dictionary.state_dict(), "the dictionary", metadata=metadata)


def without_paths(value: Any) -> Any:
    """Metadata in which a path of this machine is only its last part."""
    if isinstance(value, dict):
        return {name: without_paths(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [without_paths(one) for one in value]
    if not isinstance(value, str) or not (LOCAL.match(value) or _exists(value)):
        return value
    return re.split(r"[/\\]", value.rstrip("/\\"))[-1]


def _exists(value: str) -> bool:
    try:
        return "/" in value and Path(value).exists()
    except (OSError, ValueError):
        return False


def _front(about: Mapping[str, Any], licence: str | None, to: str) -> str:
    library = "saelens" if to == "sae-lens" else "palimpsest"
    lines = [f"library_name: {library}", "tags: [sparse-autoencoder, interpretability, palimpsest]"]
    bases = [about[name] for name in ("model", "base", "tuned") if isinstance(about.get(name), str)]
    if named := [json.dumps(name) for name in dict.fromkeys(bases) if HUB_ID.fullmatch(name)]:
        lines.append(f"base_model: [{', '.join(named)}]")
    if licence:
        lines.append(f"license: {licence}")
    return "---\n" + "\n".join(lines) + "\n---\n"


def _how(repo_id: str, to: str) -> str:
    if to == "sae-lens":
        code = f'from sae_lens import SAE\n\nsae = SAE.from_pretrained("{repo_id}", "")'
    else:
        code = f'from palimpsest import load_dictionary\n\ndictionary = load_dictionary("{repo_id}")'
    return (
        f"## Load it\n\n```python\n{code}\n```\n\nThen prove that it fits your model: "
        f"`palimpsest info {plain_text(repo_id)} --model MODEL --corpus FILE`.\n"
    )


def fact_table(title: str, rows: Mapping[str, Any]) -> str:
    """A section with a table of names and values for a card; empty without rows."""
    if not rows:
        return ""
    body = "\n".join(f"| {plain_text(name)} | `{plain_text(value)}` |" for name, value in rows.items())
    return f"## {title}\n\n| | |\n|---|---|\n{body}\n"


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Nested settings as one level; what is not set is left out."""
    if not isinstance(value, Mapping):
        return {}
    found: dict[str, Any] = {}
    for name, one in value.items():
        if isinstance(one, Mapping):
            found |= _flat(one, f"{prefix}{name}.")
        elif one is not None and one != []:
            found[f"{prefix}{name}"] = f"{one:.6g}" if isinstance(one, float) else one
    return found


def plain_text(value: Any) -> str:
    """Text that breaks out of no table cell, code mark or tag, and is read as written: names may be hostile."""
    text = ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
    shown = "".join(one if one.isprintable() else " " for one in text)
    return re.sub(r"[`|<>\[\]\\\s]+", " ", shown).strip()
