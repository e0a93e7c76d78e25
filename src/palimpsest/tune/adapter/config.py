"""The configuration of a latent adapter, as peft stores it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from peft import PeftConfig
from peft.utils import PeftType

from palimpsest.dictionaries import Dictionary
from palimpsest.errors import ConfigError
from palimpsest.tune.adapter.components import check_kind
from palimpsest.tune.adapter.dictionaries import keep_in_memory

NAME = "LATENT"


def extend_peft_types() -> PeftType:
    """A real member of peft's enum: it has no way to add one, and looks methods up by member or by its text."""
    if NAME in PeftType._member_map_:
        return PeftType(NAME)
    member = str.__new__(PeftType, NAME)
    member._name_ = member._value_ = NAME
    PeftType._member_names_.append(NAME)
    PeftType._member_map_[NAME] = member
    cast("dict[Any, Any]", PeftType._value2member_map_)[NAME] = member
    type.__setattr__(PeftType, NAME, member)
    return member


LATENT = extend_peft_types()


@dataclass
class LatentConfig(PeftConfig):
    """An adapter that edits latents of frozen dictionaries; for `peft.get_peft_model` and trl's `peft_config=`.

    Raises:
        ConfigError: A component, an option or a combination does not exist.

    Example:
        >>> config = LatentConfig(target_hooks=[("dictionary/", "resid_post.13")], component="scale")  # doctest: +SKIP
        >>> model = get_peft_model(model, config)  # doctest: +SKIP
    """

    target_hooks: Any = field(default_factory=list)
    """(dictionary, site) pairs: a folder, hub id, SAELens release/id or `Dictionary`; and an address as in
    `resid_post.13`, or None for the dictionary's own. One dictionary alone stands for a list of one pair."""
    component: str = "scale"
    """One of `palimpsest.tune.choices.COMPONENTS`."""
    transform: str = "identity"
    """g of scale: identity, exp, non-negative or one-sided."""
    rank: int | None = None
    """Of low-rank (8), mlp (64: hidden units) and gate (none: a full matrix)."""
    activation: str = "gelu"
    """Of mlp."""
    scope: str = "all"
    """Tokens that are edited: all, prompt, answer, first, last (of the prompt)."""
    scope_tokens: int = 1
    """How many tokens first and last mean."""
    skip_ids: list[int] | None = None
    """Token ids that are left alone; None means the model's BOS and padding, [] means none."""
    latents: Any = None
    """Latents that may change, `{site: [ids]}` or one list for all sites; all when absent."""
    forbid: Any = None
    """Latents that may not, written in the same way."""
    dictionary_dtype: str | None = None
    """float32 or bfloat16; as stored when absent."""
    allow_quadratic: bool = False
    """Accept a component with about latents squared parameters."""
    stop_gradient: bool = True
    """While training, end the backward pass below the lowest adapter when nothing below it is trained."""
    hashes: dict[str, str] = field(default_factory=dict)
    """SHA-256 of each site's dictionary; another one is refused."""
    target_modules: list[str] | None = field(default=None)
    """Modules behind the sites; found when the adapter is put into a model."""

    def __post_init__(self) -> None:
        """Check names and bring `target_hooks` into a form that JSON holds."""
        super().__post_init__()
        self.peft_type = LATENT
        self.task_type = self.task_type or "CAUSAL_LM"
        self.target_hooks = [_hook(one) for one in _listed(self.target_hooks)]
        if not self.target_hooks:
            raise ConfigError(
                "A latent adapter needs a dictionary", expected="target_hooks=[(dictionary, site)]"
            )
        check_kind(self.component, self.transform, self.rank, self.activation, self.scope)
        if self.scope_tokens < 1:
            raise ConfigError("scope_tokens counts tokens", expected="at least 1", found=self.scope_tokens)
        if self.dictionary_dtype not in (None, "float32", "bfloat16", "float64"):
            raise ConfigError(
                "Unknown type of a dictionary", expected="float32 or bfloat16", found=self.dictionary_dtype
            )

    @property
    def folder(self) -> Path | None:
        """Where the configuration was read from."""
        return getattr(self, "_folder", None)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, subfolder: Any = None, **kwargs: Any) -> Any:
        """As peft does it; remembers the folder, from which relative paths are also looked for."""
        made: Any = super().from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)
        if Path(str(pretrained_model_name_or_path)).is_dir():
            made._folder = Path(pretrained_model_name_or_path)
        return made


def _listed(hooks: Any) -> list[Any]:
    single = isinstance(hooks, (str, Path, Dictionary))
    pair = isinstance(hooks, tuple) and len(hooks) == 2 and (hooks[1] is None or isinstance(hooks[1], str))
    if single:
        return [(hooks, None)]
    return [hooks] if pair else list(hooks)


def _hook(one: Any) -> list[str | None]:
    if not isinstance(one, (list, tuple)) or len(one) != 2 or not (one[1] is None or isinstance(one[1], str)):
        raise ConfigError(
            "target_hooks holds something else than pairs",
            expected="(dictionary, site), as in ('dictionary/', 'resid_post.13')",
            found=repr(one)[:120],
        )
    dictionary, site = one
    if isinstance(dictionary, Dictionary):
        return [keep_in_memory(dictionary), site or dictionary.site]
    return [str(dictionary), site]


__all__ = ["LATENT", "LatentConfig", "extend_peft_types"]
