"""The options of dictionary training: where activations come from, the recipe, and what happens beside it."""

from dataclasses import dataclass, field, fields, replace
from typing import Annotated, Any, Literal

from cyclopts import Parameter

from palimpsest.dictionaries.config import Objective, Partition, TrainConfig
from palimpsest.errors import ConfigError
from palimpsest.options import FLAT, CorpusOptions, Count, ModelOptions, RunOptions


@Parameter(group="Training")
@dataclass(frozen=True, kw_only=True)
class TrainingOptions:
    """How activations reach the trainer, and what is made beside the dictionary."""

    block_length: Count = 256
    """Tokens of a packed block of text; at most the model's context."""

    expansion: Count | None = None
    """Latents per dimension of the activations, in place of --latents."""

    buffer: Count | None = None
    """Tokens that the shuffle buffer mixes; by default 64 batches, at most a sixteenth of the run and 1 GiB."""

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
    """Which model of a store of two."""

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
        if self.recipe.partition.total:
            raise ConfigError("Only a crosscoder has latents of one model or shared ones")


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
        if self.view == "diff" and self.recipe.partition.total:
            raise ConfigError("Only a crosscoder has latents of one model or shared ones")


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


def variants(recipe: TrainConfig, texts: tuple[str, ...]) -> dict[str, TrainConfig]:
    """Recipes by the name of their folder, from texts such as `k=64,lr=1e-3` or `large:k=64`.

    Raises:
        ConfigError: A text names no value of a recipe, or two make the same recipe.
    """
    made: dict[str, TrainConfig] = {}
    for text in texts:
        said, colon, values = text.partition(":")
        changes = [part.partition("=")[::2] for part in (values if colon else text).split(",")]
        name = said.strip() if colon else "-".join(f"{key.strip()}{value.strip()}" for key, value in changes)
        changed = recipe
        for key, value in changes:
            changed = _changed(changed, key.strip().replace("-", "_"), value.strip(), text)
        if name in made:
            raise ConfigError("Two variants have the same name", found=name)
        made[name] = changed
    return made


def _changed(recipe: TrainConfig, key: str, value: str, text: str) -> TrainConfig:
    """A recipe with one value changed, wherever the value lives."""
    key = {"latents": "n_latents", "compute_dtype": "dtype"}.get(key, key)
    try:
        if key in _plain(TrainConfig) and key not in ("view", "device"):
            return replace(recipe, **{key: _read(getattr(recipe, key), value)})
        for group in ("objective", "partition"):
            held: Objective | Partition = getattr(recipe, group)
            if key in _plain(type(held)):
                return replace(recipe, **{group: replace(held, **{key: _read(getattr(held, key), value)})})
    except ValueError as error:
        raise ConfigError(f"The variant '{text}' cannot be read", found=error) from error
    raise ConfigError(
        f"The variant '{text}' changes nothing of a recipe",
        expected="values such as k=64 or latents=8192,lr=1e-3",
        found=key,
    )


def _plain(config: type[Any]) -> set[str]:
    return {f.name for f in fields(config)} - {"objective", "partition", "prefixes", "seed"} | (
        {"seed"} if config is TrainConfig else set()
    )


def _read(before: Any, text: str) -> Any:
    """A value of the kind that the field holds; a field that may be absent holds a number."""
    if isinstance(before, str):
        return text
    number = float(text)
    return int(number) if number == int(number) and "e" not in text.lower() else number
