"""Reading a battery: its text, the cached side of its base, and the check that both still hold."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from palimpsest.artifacts import Artifact, input_entry, open_artifact
from palimpsest.audit.battery.make import DESCRIPTION, MAIN, SCHEMA, STAGE, tokenizer_hash
from palimpsest.audit.battery.text import BatteryText, load_documents, masking_of
from palimpsest.audit.overlap import match, overlap_counts, overlap_curve
from palimpsest.corpus import Document
from palimpsest.dictionaries import Codes, Dictionary, TokenNorm, load_dictionary
from palimpsest.display.notebook import Card, Rich, Table
from palimpsest.errors import ArtifactError, DictionaryError, PairError
from palimpsest.harvest.cached import BaseSide, read_tokens, select_rows
from palimpsest.harvest.stream import BaseCodes
from palimpsest.models import LanguageModel, fingerprint
from palimpsest.options import CorpusOptions

PROBE_TOKENS = 1024
"""Tokens of the general corpus that the base is read over again when a battery is opened."""

TOLERANCE = {"float32": (2e-3, 0.01), "bfloat16": (5e-2, 0.05), "float16": (2e-2, 0.03)}
"""Mean |Δloss| in nats and mean share of changed top-5 latents that numerics alone may cause."""


@dataclass(frozen=True)
class ReaderEntry:
    """One dictionary of a battery."""

    name: str
    site: str
    path: str
    sha256: str | None
    control: bool


class Battery(Rich):
    """A finished battery's folder.

    Raises:
        ArtifactError: The folder is no battery, unfinished, or of a newer schema.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.artifact: Artifact = open_artifact(self.path, stage=STAGE)
        self.description: dict[str, Any] = self.artifact.read_json(DESCRIPTION)
        if self.description.get("schema") != SCHEMA:
            raise ArtifactError(
                f"{path} is a battery of another schema",
                expected=SCHEMA,
                found=self.description.get("schema"),
                fix="Make it again with this version, or install the version that wrote it",
            )

    def __repr__(self) -> str:
        """Where it is and what it holds."""
        return f"Battery({self.path}, {', '.join(self.names)})"

    def _card(self) -> Card:
        corpora = [
            (
                row["name"],
                row["role"],
                row["documents"],
                row["tokens"],
                row["aside_documents"],
                row["aside_tokens"],
            )
            for row in self.description["corpora"]
        ]
        columns = ("corpus", "role", "documents", "tokens", "set aside", "their tokens")
        readers = [(one.name, one.site, one.path, one.control) for one in self.readers]
        kept = {"losses": self.has_loss, "activations": self.has_activations}
        return Card(
            "Battery",
            str(self.path),
            facts={
                "base": self.base.get("path"),
                "dtype": self.base.get("dtype"),
                "kept of the base": ["codes", *(name for name, there in kept.items() if there)],
                "longest document": self.description["max_length"],
                "calibrated with nulls": (self.path / "calibration" / "manifest.json").exists(),
            },
            tables=[
                Table(columns, corpora),
                Table(("dictionary", "site", "path", "control"), readers, "Read through", folded=True),
            ],
        )

    @property
    def names(self) -> list[str]:
        """Corpora, the general one first."""
        return [row["name"] for row in self.description["corpora"]]

    @property
    def base(self) -> dict[str, Any]:
        """Path, fingerprint, dtype and tokenizer hash of the base model."""
        return self.description["base"]

    @property
    def has_loss(self) -> bool:
        """Whether the base's losses are cached."""
        return bool(self.description["loss"])

    @property
    def has_activations(self) -> bool:
        """Whether the base's activations are cached."""
        return bool(self.description["activations"])

    @property
    def text_options(self) -> CorpusOptions:
        """How its rows were read, but for limits on how many."""
        made = self.artifact.manifest["config"]["corpora"]
        known = {field.name for field in fields(CorpusOptions)} - {
            "max_documents",
            "roles",
            "dialogue",
            "max_length",
        }
        chosen: dict[str, Any] = {key: value for key, value in made.items() if key in known}
        roles = tuple(made["roles"]) if made.get("roles") else None
        dialogue = tuple(made.get("dialogue") or ())
        length = self.description["max_length"]
        return CorpusOptions(**chosen, roles=roles, dialogue=dialogue, max_length=length)

    @cached_property
    def readers(self) -> list[ReaderEntry]:
        """Dictionaries, the primary one first."""
        return [
            ReaderEntry(row["name"], row["site"], row["path"], row.get("sha256"), row["control"])
            for row in self.description["readers"]
        ]

    @property
    def sites(self) -> list[str]:
        """Sites that are read, the primary one first."""
        return list(dict.fromkeys(reader.site for reader in self.readers))

    def row(self, name: str) -> dict[str, Any]:
        """What the battery says of one corpus."""
        return self.description["corpora"][self.names.index(name)]

    def text(self, name: str) -> BatteryText:
        """The audited documents of one corpus."""
        masking = masking_of(self.description["masking"])
        return BatteryText(name, self.row(name)["sources"], self._file("text", name), masking)

    def aside(self, name: str) -> list[Document]:
        """The documents of one corpus that are never audited."""
        return load_documents(self._file("aside", name))

    def dictionaries(self, override: Sequence[str] = ()) -> list[Dictionary]:
        """The dictionaries behind `readers`; `override` gives new paths of the ones that are no controls.

        Raises:
            DictionaryError: One is gone, or has another content than the one that the battery was made with.
        """
        found, paths = [], list(override)
        for reader in self.readers:
            if reader.control:
                found.append(load_dictionary(str(self.path / reader.path)))
                continue
            path = paths.pop(0) if paths else reader.path
            if Path(path).exists() and reader.sha256 is not None:
                content = input_entry(path)["sha256"]
                if content != reader.sha256:
                    raise DictionaryError(
                        f"{path} is not the dictionary that the battery {self.path} was made with",
                        expected=f"sha256 {reader.sha256}",
                        found=f"sha256 {content}",
                        fix="Name the battery's own dictionary with --dictionary, or make the battery again",
                    )
            elif reader.sha256 is not None:
                raise DictionaryError(
                    f"The dictionary {path} of the battery {self.path} is gone",
                    fix="Name its new place with --dictionary",
                )
            found.append(load_dictionary(path))
        return found

    def base_side(self, name: str, *, activations: bool = True) -> BaseSide:
        """The cached side of one corpus."""
        tensors = load_file(self._file("base", name))
        codes = {}
        for reader, row in zip(self.readers, self.description["readers"], strict=True):
            parts = (tensors[f"{key}.{reader.name}"] for key in ("crow", "indices", "values"))
            crow, indices, values = parts
            widths = crow.diff()
            fixed = len(widths) > 0 and bool((widths == widths[0]).all())
            width = int(widths[0]) if fixed else None
            normed = f"scale.{reader.name}" in tensors
            kept = (
                TokenNorm(*(tensors[f"{key}.{reader.name}"] for key in TokenNorm._fields)) if normed else None
            )
            codes[reader.name] = BaseCodes(
                Codes(crow, indices, values, row["latents"], width, kept), tensors[f"residual.{reader.name}"]
            )
        acts = {site: tensors[f"acts.{site}"] for site in self.sites} if self.has_activations else {}
        moments = {
            site: {f"{key}_base": tensors[f"moment.{key}.{site}"] for key in ("sum", "squares")}
            for site in self.sites
        }
        return BaseSide(tensors["start"], tensors.get("loss"), codes, acts if activations else {}, moments)

    def check_base(self, model: LanguageModel, dictionaries: Sequence[Dictionary]) -> None:
        """Prove that a loaded base is the battery's, and that this machine still gives its numbers.

        Raises:
            PairError: Other weights or another tokenizer.
            ArtifactError: The same weights give other losses or latents (another library version or dtype).
        """
        if fingerprint(model) != self.base["fingerprint"]:
            raise PairError(
                f"The battery {self.path} was made with another base",
                expected=f"{self.base['path']} (weights {self.base['fingerprint'][:12]}…)",
                found=f"{model.name} (weights {fingerprint(model)[:12]}…, {model.dtype})",
                fix="Audit fine-tunes of that base, or make a battery of this one",
            )
        if tokenizer_hash(model.tokenizer) != self.base["tokenizer"]:
            raise PairError(
                f"The battery {self.path} was made with another tokenizer",
                fix="Use the base's own tokenizer, or make the battery again",
            )
        self._probe(model, dictionaries)

    def _probe(self, model: LanguageModel, dictionaries: Sequence[Dictionary]) -> None:
        name = self.names[0]
        cached = self.base_side(name, activations=False)
        batch = next(iter(self.text(name).batches(PROBE_TOKENS)))
        side = read_tokens(model, batch, self.sites, loss=self.has_loss)
        rows = cached.rows(side.document)
        changed = 0.0
        for reader, dictionary in zip(self.readers, dictionaries, strict=True):
            now = dictionary.encode(side.acts[reader.site].to(dictionary.device)).to("cpu").top(5)
            matches = match(select_rows(cached.codes[reader.name].codes, rows).top(5), now)
            kept = overlap_curve(overlap_counts(matches), matches.longer)[:, -1].nanmean()
            changed = max(changed, 1 - float(kept))
        moved = 0.0
        if side.loss is not None and cached.loss is not None:
            moved = float((side.loss - cached.loss[rows]).abs().nanmean())
        allowed = TOLERANCE.get(self.base["dtype"], TOLERANCE["float32"])
        if moved > allowed[0] or changed > allowed[1]:
            packages = self.artifact.manifest.get("packages", {})
            raise ArtifactError(
                f"The base no longer gives the numbers that the battery {self.path} holds",
                expected=f"losses within {allowed[0]} nats and {allowed[1]:.0%} of the top-5 latents, as made with "
                f"torch {packages.get('torch')}, transformers {packages.get('transformers')}",
                found=f"losses {moved:.2g} nats away and {changed:.1%} of the latents changed",
                fix="Make the battery again with the libraries, dtype and device that audits use",
            )

    def _file(self, part: str, name: str) -> Path:
        return self.artifact.file(f"{part}/{self.names.index(name):03d}.safetensors")


__all__ = ["MAIN", "Battery", "ReaderEntry"]
