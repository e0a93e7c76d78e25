"""`palimpsest info`."""

from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from palimpsest.cli import VERBS
from palimpsest.cli.command import Display, emit, say, verb_app
from palimpsest.cli.verification import Proof, show_verification
from palimpsest.errors import ConfigError

app = verb_app("info", VERBS["info"].capitalize() + ".")
FLAT = Parameter(name="*")

ORIGIN = (
    "model",
    "base",
    "tuned",
    "revision",
    "site",
    "tokens",
    "metrics",
    "evaluation",
    "neuronpedia",
    "repo",
)
"""What of a dictionary's metadata is shown."""

ADAPTER = (
    "peft_type",
    "base_model_name_or_path",
    "component",
    "transform",
    "rank",
    "scope",
    "target_hooks",
    "hashes",
    "r",
    "target_modules",
)
"""What is worth telling of a PEFT adapter's configuration."""


@app.default
def info(
    path: str,
    *,
    corpus: tuple[str, ...] = (),
    check: bool = False,
    revision: Annotated[str | None, Parameter(name="--dictionary-revision")] = None,
    proof: Annotated[Proof, FLAT] = Proof(),  # noqa: B008
    display: Annotated[Display, FLAT] = Display(),  # noqa: B008
) -> int:
    """Say what a folder is, where it came from, and whether it is whole; try a dictionary on real text.

    Args:
        path: Any folder that palimpsest wrote, a PEFT adapter, or a dictionary of any known format: a folder, a weights
            file, a hub id, a SAELens release/id.
        corpus: Text to try a dictionary on, with --model (or --base and --tuned): does it fit, and if not, why.
        check: Compare the weights of a dictionary with their hashes, too; otherwise only headers are read.
        revision: Of a dictionary on the hub.
        proof: The model and what follows.
        display: What is printed.
    """
    stage = _stage(path)
    if stage not in (None, "dictionary"):
        if corpus or proof.model or proof.base:
            raise ConfigError(
                f"{path} is no dictionary, so it cannot be tried on text", found=f"stage {stage}"
            )
        _artifact(Path(path), display)
        return 0
    if (adapter := Path(path) / "adapter_config.json").is_file():
        facts = _adapter(adapter)
        emit(display, facts, lambda: _content(facts))
        return 0
    asked = proof.config(path, corpus, "--corpus")
    facts = _dictionary(path, revision, check=check, native=stage is not None)
    found = None
    if asked is not None:
        from palimpsest.dictionaries import load_dictionary
        from palimpsest.verify import run_verify

        found = run_verify(asked, load_dictionary(path, revision=revision))
    emit(
        display,
        facts | ({} if found is None else {"verification": found.to_dict()}),
        lambda: _tell(facts, found),
    )
    return proof.code(found)


def _stage(path: str) -> str | None:
    """The stage that wrote a folder; None for what is no artifact."""
    from palimpsest.artifacts.reading import is_manifest, read_json

    manifest = Path(path) / "manifest.json"
    try:
        content = read_json(manifest) if manifest.is_file() else None
    except OSError:
        return None
    return content["stage"] if isinstance(content, dict) and is_manifest(content) else None


def _adapter(path: Path) -> dict[str, Any]:
    """What the configuration of a PEFT adapter says, of ours or of others; a run's own folder says more."""
    from palimpsest.artifacts.reading import read_json

    config = read_json(path)
    if not isinstance(config, dict):
        raise ConfigError(f"{path} is no adapter configuration", expected="an object of JSON")
    told = {key: value for key, value in config.items() if key in ADAPTER and value not in (None, [], {})}
    lists = config.get("latents")
    if isinstance(lists, dict):
        told["latents"] = {site: len(one) for site, one in lists.items()}
    return {"format": "PEFT adapter", **told}


def _artifact(path: Path, display: Display) -> None:
    from palimpsest.artifacts import open_artifact
    from palimpsest.artifacts.contents import contents

    artifact = open_artifact(path, allow_running=True)
    manifest, content = artifact.manifest, contents(artifact)
    emit(display, manifest | {"content": content}, lambda: _show(manifest, content))


def _dictionary(path: str, revision: str | None, *, check: bool, native: bool) -> dict[str, Any]:
    """What the configuration and the headers of a dictionary's files say."""
    facts: dict[str, Any] = {}
    if native:
        from palimpsest.artifacts import open_artifact

        manifest = open_artifact(path, stage="dictionary", allow_running=True, verify=check).manifest
        facts = dict(manifest)
        if manifest["status"] != "complete":
            return facts
    from palimpsest.dictionaries.formats.load import find_dictionary, load_dictionary

    form, header = find_dictionary(path, revision=revision)
    if check:
        load_dictionary(path, revision=revision)
    content = {name: value for name, value in header.fields.items() if value not in (None, ())}
    return facts | {
        "format": form.name,
        "file": str(header.file),
        "bytes": header.bytes,
        "checked": check,
        "content": {**content, "metadata": dict(header.metadata)},
        "tensors": {
            name: {"shape": list(one.shape), "dtype": str(one.dtype).removeprefix("torch.")}
            for name, one in header.tensors.items()
        },
        "notes": list(header.notes),
    }


def _tell(facts: dict[str, Any], found: Any) -> None:
    if "stage" in facts:
        complete = facts["status"] == "complete"
        hashes = (
            "all files match their hashes"
            if facts.get("checked")
            else "headers read; --check compares all bytes"
        )
        _show(facts, facts.get("content", {}), hashes if complete else None)
    else:
        say(f"dictionary in {facts['format']} format" + (", all bytes read" if facts["checked"] else ""))
        _content(facts["content"])
        say(f"  file {facts['file']}: {facts['bytes']:,} bytes of weights")
    for name, one in facts.get("tensors", {}).items():
        say(f"  tensor {name}: {one['shape']} {one['dtype']}")
    for note in facts.get("notes", []):
        say(f"  ! {note}")
    if found is not None:
        show_verification(found)


def _show(manifest: dict[str, Any], content: dict[str, Any], whole: str | None = None) -> None:
    if manifest["status"] != "complete":
        whole = "unfinished: its command with --resume goes on"
    say(f"{manifest['stage']} ({manifest['status']}, {whole or 'all files match their hashes'})")
    say(f"  created {manifest['created']} by palimpsest {manifest['palimpsest']}")
    _content(content)
    for name, entry in manifest["inputs"].items():
        say(f"  input {name}: {entry.get('path')} ({str(entry.get('sha256'))[:12]})")
    for name, entry in manifest["files"].items():
        say(f"  file {name}: {entry['bytes']:,} bytes")
    for name in manifest.get("attached", []):
        say(f"  attached {name} (made from the files above, not verified)")
    for name, seconds in manifest["timings"].items():
        say(f"  {name}: {seconds:.1f} s")


def _content(content: dict[str, Any]) -> None:
    about = {key: value for key, value in content.items() if key != "metadata"}
    about |= {k: v for k, v in content.get("metadata", {}).items() if k in ORIGIN and v is not None}
    for key, value in about.items():
        say(f"  {key}: {_short(value)}")


def _short(value: Any) -> str:
    """Figures with four digits, side by side."""
    if isinstance(value, dict):
        return ", ".join(f"{name} {_short(one)}" for name, one in value.items() if one is not None)
    if isinstance(value, list | tuple):
        return ("; " if any(isinstance(one, dict) for one in value) else ", ").join(map(_short, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)
