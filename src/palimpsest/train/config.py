"""The options of dictionary training: where activations come from, the recipe, and what happens beside it."""

import math
import re
from dataclasses import dataclass, field, fields, replace
from typing import Annotated, Any, Literal

from cyclopts import Parameter

from palimpsest.dictionaries.config import NAME, RESERVED, Partition, TrainConfig
from palimpsest.errors import ConfigError
from palimpsest.options import FLAT, CorpusOptions, Count, ModelOptions, RunOptions, parse_count

REPOSITORY = re.compile(r"[A-Za-z0-9_.-]+/[A-Za-z0-9_.-]+")


@Parameter(group="Training")
@dataclass(frozen=True, kw_only=True)
class TrainingOptions:
    """How activations reach the trainer, and what is made beside the dictionary."""

    block_length: Count = 256
    """Tokens of a packed block of text; at most the model's context."""

    expansion: Count | None = None
    """Latents per dimension of the activations, in place of --latents (and without --prefixes)."""

    buffer: Count | None = None
    """Tokens that the shuffle buffer mixes, two batches at least; by default 64 batches, at most a sixteenth of the run
    and 1 GiB."""

    shuffle: Annotated[bool, Parameter(negative="--no-shuffle")] = True
    """Mix tokens in the buffer; without it they are taken as they come, neighbours together."""

    buffer_dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the buffer; bfloat16 halves its memory."""

    variant: tuple[str, ...] = ()
    """Train several dictionaries on the same stream, each the recipe with some values changed: `k=16` `k=64,lr=1e-3`.
    Each goes to a folder of its own inside --out, called k16 or as said: `small:latents=512,k=16`."""

    eval_corpus: tuple[str, ...] = ()
    """Held-out text: measure the finished dictionary on it (FVE, L0, CE and KL recovered)."""

    eval_tokens: Count = 50_000
    """Tokens of that text that are measured."""

    track: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ()
    """Also send the figures to these trackers; training.jsonl is always written."""

    push: str | None = None
    """Upload the finished dictionary, with its card, to this hub repository (private)."""

    def __post_init__(self) -> None:
        """Refuse blocks that hold only a BOS, and counts that mean nothing."""
        if self.block_length < 2:
            raise ConfigError(
                "The blocks are too short", expected="at least 2 tokens", found=self.block_length
            )
        for name in ("expansion", "buffer", "eval_tokens"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ConfigError(f"{name} must be above 0", found=value)
        if self.push is not None and self.variant:
            raise ConfigError("--push uploads one dictionary", fix="Leave --variant out, or push later")
        if self.push is not None and not REPOSITORY.fullmatch(self.push):
            raise ConfigError("--push names no hub repository", expected="owner/name", found=self.push)


@dataclass(frozen=True, kw_only=True)
class TrainSaeConfig:
    """A sparse autoencoder of one model's activations at one site."""

    site: str
    """Where activations are read, as in `resid_post.13` or `resid_post.50%`."""

    run: Annotated[RunOptions, FLAT]
    """Where the dictionary goes."""

    model: str | None = None
    """The model: a folder or a hub id. With --store, the store is checked against it on a few documents."""

    corpus: tuple[str, ...] = ()
    """Text files, folders or hub data sets; rows are taken from each in turn, again from the start at the end."""

    store: str | None = None
    """Read activations from a store that `palimpsest harvest` wrote, instead of a model and text."""

    side: Literal["base", "tuned"] = "base"
    """Which side of a pair it is: which model of a store of two, and what the dictionary says that it reads."""

    training: Annotated[TrainingOptions, FLAT] = field(default_factory=TrainingOptions)
    """How activations reach the trainer, and what is made beside the dictionary."""

    recipe: Annotated[TrainConfig, FLAT] = field(default_factory=TrainConfig)
    """How the dictionary is trained."""

    models: Annotated[ModelOptions, FLAT] = field(default_factory=ModelOptions)
    """How the model is loaded."""

    corpora: Annotated[CorpusOptions, FLAT] = field(default_factory=CorpusOptions)
    """How text is read."""

    def __post_init__(self) -> None:
        """Require one source of activations."""
        _check_source(self.store, self.corpus, model=self.model)
        if self.training.eval_corpus and self.model is None:
            raise ConfigError("--eval-corpus runs the model", fix="Add --model")
        check_recipe(self)


@dataclass(frozen=True, kw_only=True)
class TrainPairConfig:
    """A dictionary of a base and its fine-tune at one site."""

    site: str
    """Where activations are read, as in `resid_post.13` or `resid_post.50%`."""

    run: Annotated[RunOptions, FLAT]
    """Where the dictionary goes."""

    view: Annotated[Literal["diff", "pair"], Parameter(parse=False)] = "pair"
    """diff: an SAE of tuned minus base. pair: a crosscoder, which reads and writes both."""

    base: str | None = None
    """The base model: a folder or a hub id."""

    tuned: str | None = None
    """Its fine-tune: a full checkpoint or a PEFT adapter."""

    corpus: tuple[str, ...] = ()
    """Text files, folders or hub data sets; rows are taken from each in turn, again from the start at the end."""

    store: str | None = None
    """Read activations from a store that `palimpsest harvest --tuned` wrote; with --base and --tuned it is checked
    against them on a few documents."""

    training: Annotated[TrainingOptions, FLAT] = field(default_factory=TrainingOptions)
    """How activations reach the trainer, and what is made beside the dictionary."""

    recipe: Annotated[TrainConfig, FLAT] = field(default_factory=TrainConfig)
    """How the dictionary is trained."""

    models: Annotated[ModelOptions, FLAT] = field(default_factory=ModelOptions)
    """How models are loaded."""

    corpora: Annotated[CorpusOptions, FLAT] = field(default_factory=CorpusOptions)
    """How text is read."""

    def __post_init__(self) -> None:
        """Require one source of activations of both models."""
        if (self.base is None) != (self.tuned is None):
            raise ConfigError("A pair has two models", expected="--base and --tuned")
        _check_source(self.store, self.corpus, base=self.base, tuned=self.tuned)
        if self.training.eval_corpus and self.base is None:
            raise ConfigError("--eval-corpus runs the models", fix="Add --base and --tuned")
        if self.models.one_at_a_time:
            raise ConfigError(
                "Training reads both models side by side",
                fix="Leave --one-at-a-time out, or harvest into a store first",
            )
        check_recipe(self)


def _check_source(store: str | None, corpus: tuple[str, ...], **models: str | None) -> None:
    """A store, or models and text."""
    names = " and ".join(f"--{name}" for name in (*models, "corpus"))
    live = all(models.values())
    if store is not None and corpus:
        raise ConfigError(
            "Training needs one source of activations", expected=f"{names}, or --store", found="both"
        )
    if store is None and not (live and corpus):
        raise ConfigError(
            "Training needs one source of activations", expected=f"{names}, or --store", found="neither"
        )


def check_recipe(config: TrainSaeConfig | TrainPairConfig) -> None:
    """Refuse what contradicts itself between the recipe, its variants and the options beside it.

    Raises:
        ConfigError: `--expansion` beside a number of latents; bound latents where there is no pair to bind to.
    """
    recipes = [config.recipe, *variants(config.recipe, config.training.variant).values()]
    sizes = {recipe.n_latents for recipe in recipes} - {TrainConfig.n_latents}
    if config.training.expansion is not None and (sizes or any(recipe.prefixes for recipe in recipes)):
        raise ConfigError(
            "The number of latents is said twice", expected="--expansion, or --latents (with --prefixes)"
        )
    is_crosscoder = isinstance(config, TrainPairConfig) and config.view == "pair"
    if not is_crosscoder and any(recipe.partition.total for recipe in recipes):
        raise ConfigError("Only a crosscoder has latents of one model or shared ones")


def variants(recipe: TrainConfig, texts: tuple[str, ...]) -> dict[str, TrainConfig]:
    """Recipes by the name of their folder, from texts such as `k=64,lr=1e-3` or `large:k=64`.

    Raises:
        ConfigError: A text names no value of a recipe, or its name is no folder name.
    """
    made: dict[str, TrainConfig] = {}
    for text in texts:
        said, colon, values = text.partition(":")
        changes = [part.partition("=")[::2] for part in (values if colon else text).split(",")]
        pairs = [(key.strip(), value.strip()) for key, value in changes]
        name = said.strip() if colon else "-".join(key + value for key, value in pairs)
        if not NAME.fullmatch(name) or name.casefold() in RESERVED or name.endswith("-evaluation.json"):
            raise ConfigError(
                "A variant's name is a folder name",
                expected="up to 100 letters, digits, - _ and ., not the name of a file of the run",
                found=repr(name),
                fix="Name it yourself, as in small:latents=512",
            )
        if name in made:
            raise ConfigError("Two variants have the same name", found=name)
        made[name] = _changed(recipe, pairs, text)
    return made


def _changed(recipe: TrainConfig, pairs: list[tuple[str, str]], text: str) -> TrainConfig:
    """A recipe with some values changed at once, wherever they live."""
    if len({key for key, _ in pairs}) < len(pairs):
        raise ConfigError(f"The variant '{text}' sets a value twice")
    top: dict[str, Any] = {}
    groups: dict[str, dict[str, Any]] = {"objective": {}, "partition": {}}
    for said, value in pairs:
        key = said.replace("-", "_")
        key = {"latents": "n_latents", "compute_dtype": "dtype"}.get(key, key)
        homes = [top] * (key in _PLAIN) + [
            held for group, held in groups.items() if key in _names(type(getattr(recipe, group)))
        ]
        if not homes:
            raise ConfigError(
                f"The variant '{text}' changes nothing of a recipe",
                expected="values such as k=64 or latents=8192,lr=1e-3",
                found=said or "no name",
            )
        try:
            homes[0][key] = _read(key, value)
        except (ValueError, ConfigError) as error:
            raise ConfigError(f"The variant '{text}' cannot be read", found=error) from error
    inner = {name: replace(getattr(recipe, name), **held) for name, held in groups.items() if held}
    return replace(recipe, **top, **inner)


def _names(config: type[Any]) -> set[str]:
    return {f.name for f in fields(config)}


_PLAIN = _names(TrainConfig) - {"objective", "partition", "view", "device"}
_TEXTS = ("activation", "dtype", "error", "sparsity")
_COUNTS = {"n_latents", "tokens", "batch_size", "dead_after_tokens", *_names(Partition)}


def _read(key: str, text: str) -> Any:
    """A value of the kind that the field holds."""
    if key in _TEXTS:
        return text
    if key == "prefixes":
        return tuple(parse_count(part, key) for part in text.split("+"))
    if key in _COUNTS:
        return 0 if text == "0" else parse_count(text, key)
    if key == "seed":
        return int(text)
    number = float(text)
    if not math.isfinite(number):
        raise ValueError("it is not finite")
    return int(number) if number == int(number) and "e" not in text.lower() else number
