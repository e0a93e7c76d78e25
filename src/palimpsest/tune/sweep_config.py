"""The options of a sweep: a fine-tune with several components, learning rates and penalties. Imports no torch."""

import math
from dataclasses import dataclass, field, replace
from typing import Annotated, Any

from cyclopts import Parameter

from palimpsest.errors import ConfigError
from palimpsest.options import FLAT, Number
from palimpsest.tune.choices import COMPONENTS
from palimpsest.tune.config import AdapterOptions, TuneConfig

KNOWN = (*COMPONENTS, "lora")


@Parameter(group="Sweep")
@dataclass(frozen=True, kw_only=True)
class SweepOptions:
    """What is varied; every combination is trained."""

    components: tuple[str, ...] = ()
    """Components; --component alone by default."""

    lrs: tuple[Number, ...] = ()
    """Learning rates; by default --lr, or what fits the component."""

    l1s: tuple[Number, ...] = ()
    """Weights of the L1 penalty; --l1 alone by default. lora and vector, which have no latents, are trained once."""

    def __post_init__(self) -> None:
        """Refuse values that mean nothing."""
        if wrong := [name for name in self.components if name not in KNOWN]:
            raise ConfigError("Unknown component", expected=" | ".join(KNOWN), found=", ".join(wrong))
        if any(not 0 < value < math.inf for value in self.lrs):
            raise ConfigError("A learning rate is above 0", found=self.lrs)
        if any(not 0 <= value < math.inf for value in self.l1s):
            raise ConfigError("A penalty is 0 or more", found=self.l1s)


@dataclass(frozen=True, kw_only=True)
class SweepConfig(TuneConfig):
    """A fine-tune in several versions, each in a folder of its own in `run.out`."""

    sweep: Annotated[SweepOptions, FLAT] = field(default_factory=SweepOptions)
    """What is varied."""

    def __post_init__(self) -> None:
        """Require something to vary."""
        super().__post_init__()
        if not (self.sweep.components or self.sweep.lrs or self.sweep.l1s):
            raise ConfigError(
                "There is nothing to sweep", fix="Pass --lrs 0.01 0.03 0.1, --l1s or --components"
            )


def combinations(config: SweepConfig) -> dict[str, TuneConfig]:
    """Every version by its name, which says what was varied.

    Raises:
        ConfigError: A version makes no sense.
    """
    swept = config.sweep
    made: dict[str, TuneConfig] = {}
    for component in swept.components or (config.adapter.component,):
        latents = component not in ("lora", "vector")
        for lr in swept.lrs or (config.schedule.lr,):
            for l1 in (swept.l1s or (config.schedule.l1,)) if latents else (0.0,):
                name = component
                name += f"-lr-{lr:g}" if swept.lrs else ""
                name += f"-l1-{l1:g}" if swept.l1s and latents else ""
                made[name] = version(config, name, component, lr=lr, l1=l1)
    return made


def version(config: TuneConfig, name: str, component: str, *, lr: Any = None, l1: Any = None) -> TuneConfig:
    """The fine-tune of one component in a folder inside that of `config`.

    Options that the component does not have are left out.

    Args:
        config: The common options.
        name: Of the folder.
        component: What is trained.
        lr: Its learning rate; by default what fits it.
        l1: Its penalty; by default that of `config`.
    """
    adapter, schedule = config.adapter, config.schedule
    plain, kept = AdapterOptions(), dict[str, Any]()
    if component != "scale":
        kept["transform"] = plain.transform
    if component not in ("low-rank", "mlp", "gate", "lora") or component != adapter.component:
        kept["rank"] = plain.rank
    changes: dict[str, Any] = {"lr": lr, "l1": schedule.l1 if l1 is None else l1}
    if component in ("lora", "vector"):
        changes |= {"l1": 0.0, "group": 0.0, "top_n": None}
        kept |= {"latents": (), "forbid": ()}
    if component == "lora":
        kept |= {"scope": "all", "scope_tokens": 1, "allow_quadratic": False}
    return TuneConfig(
        config.model,
        run=replace(config.run, out=config.run.out / name, resume=False, overwrite=False),
        dictionary=config.dictionary,
        site=config.site,
        adapter=replace(adapter, component=component, **kept),
        objective=config.objective,
        schedule=replace(schedule, **changes),
        log=config.log,
        models=config.models,
        corpora=config.corpora,
    )
