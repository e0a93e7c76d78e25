"""The options of labels: whose, of which latents, and who judges them."""

import re
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass, field
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from cyclopts import Parameter

from palimpsest.errors import ConfigError
from palimpsest.options import FLAT, RUN_ONLY, Count, Dtype, Number, RunOptions, config_dict

Provider = Literal["neuronpedia", "openai", "local", "tokens"]
JudgeKind = Literal["openai", "local", "tokens", "none"]

LOOPBACK = ("localhost", "127.0.0.1", "::1")
HOW = ("accept_partial", "concurrency", "timeout", "retries", "budget", "allow_http", "key_variable")
"""Options that say how a provider is asked, not what it is asked: a run may go on with others."""


@Parameter(group="Provider")
@dataclass(frozen=True, kw_only=True)
class ProviderOptions:
    """How the provider and the judge are reached."""

    model: str | None = None
    """Model that labels: its name at the endpoint, or a folder or hub id of a local one."""
    endpoint: str | None = None
    """Address of an OpenAI-style server, up to `/v1`; `/chat/completions` is added."""
    key_variable: str = "OPENAI_API_KEY"
    """Environment variable that holds the server's key; a server on this machine needs none."""
    allow_http: bool = False
    """Send text, and the key, over plain http to another machine."""
    neuronpedia: str | None = None
    """Neuronpedia id of the dictionary, as in `gemma-2-2b/20-gemmascope-res-16k`; by default its own."""
    concurrency: Count = 4
    """Latents that a server is asked about at once."""
    timeout: Number = 60
    """Seconds that one answer may take."""
    retries: int = 4
    """Further attempts when a server is busy or the line breaks."""
    budget: Number | None = None
    """Seconds after which nothing more is asked; `--resume` goes on."""
    device: str | None = None
    """Where a local model runs, e.g. `cuda:0`; the default is a GPU when there is one."""
    dtype: Dtype = "auto"
    """Weights of a local model: auto, float32, bfloat16 or float16."""

    def __post_init__(self) -> None:
        """Refuse times and counts that are none, and addresses that are not safe."""
        if not 0 < self.timeout <= 3600 or not 0 <= self.retries <= 20:
            raise ConfigError(
                "A server cannot be asked like this",
                expected="--timeout above 0 and at most 3600 seconds, --retries 0 to 20",
                found=f"{self.timeout}, {self.retries}",
            )
        if self.budget is not None and self.budget <= 0:
            raise ConfigError("--budget is a time", expected="more than 0 seconds", found=self.budget)
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", self.key_variable):
            # What stands there may be the key itself.
            raise ConfigError(
                "--key-variable is the name of an environment variable", expected="a name, not the key"
            )
        check_endpoint(self.endpoint, self.allow_http)


@Parameter(group="Scoring")
@dataclass(frozen=True, kw_only=True)
class ScoringOptions:
    """How a label is tested on texts that it was not made from."""

    judge: JudgeKind | None = None
    """Who says whether a label fits a text; by default the provider itself, and nobody for Neuronpedia's labels."""
    judge_model: str | None = None
    """Another model for the judge than the one that labels."""
    judge_endpoint: str | None = None
    """Another server for the judge; it gets the same key."""
    texts: Count = 12
    """Texts of each latent that are held back and judged, with as many random and as many similar ones."""
    shuffles: int = 1
    """How often all labels are dealt out to wrong latents and judged again: what no meaning scores."""
    confidence: float = 0.95
    """Coverage of the intervals."""

    def __post_init__(self) -> None:
        """Refuse counts and coverages that are none."""
        if not 0 <= self.shuffles <= 100:
            raise ConfigError("--shuffles counts controls", expected="0 to 100", found=self.shuffles)
        if not 0.5 <= self.confidence < 1:
            raise ConfigError(
                "confidence is no coverage", expected="0.5 up to below 1", found=self.confidence
            )


@dataclass(frozen=True)
class LabelConfig:
    """Name latents, and test the names."""

    examples: str
    """A folder that `palimpsest examples` wrote."""

    _: KW_ONLY

    provider: Provider
    """Who labels: Neuronpedia, an OpenAI-style server, a local model, or the latent's own tokens without any model."""

    run: Annotated[RunOptions, FLAT]
    """Where the results go."""

    latents: tuple[int, ...] = ()
    """Label these latents."""

    top: Count = 100
    """Otherwise: how many, the largest by `--by`."""

    by: str | None = None
    """Column to rank latents by; `change` is |rate_tuned - rate_base| and the default for a pair, else `rate`."""

    shown: Count = 20
    """Examples that the provider sees."""

    accept_partial: bool = False
    """Finish without the labels that could not be had."""

    providers: Annotated[ProviderOptions, FLAT] = field(default_factory=ProviderOptions)
    """How the provider and the judge are reached."""

    scoring: Annotated[ScoringOptions, FLAT] = field(default_factory=ScoringOptions)
    """How a label is tested."""

    def __post_init__(self) -> None:
        """Require what the provider and the judge need, and refuse what they ignore."""
        if self.latents and self.by is not None:
            raise ConfigError("--latents and --by contradict each other", fix="Pass one of them")
        if min(self.latents, default=0) < 0 or len({*self.latents}) < len(self.latents):
            raise ConfigError("--latents are numbers, each named once", found=self.latents[:8])
        _check_reach("--provider", self.provider, self.providers.model, self.providers.endpoint)
        model, endpoint = self.judge_at
        _check_reach("--judge", self.judge, model, endpoint)
        check_endpoint(self.scoring.judge_endpoint, self.providers.allow_http)
        self._check_unused()

    @property
    def judge(self) -> JudgeKind:
        """Who judges."""
        own: JudgeKind = "none" if self.provider == "neuronpedia" else self.provider
        return self.scoring.judge or own

    @property
    def judge_at(self) -> tuple[str | None, str | None]:
        """Model and server of the judge."""
        return (
            self.scoring.judge_model or self.providers.model,
            self.scoring.judge_endpoint or self.providers.endpoint,
        )

    def identity(self) -> Mapping[str, Any]:
        """What decides the result: a run may be resumed with these only."""
        return config_dict(self, drop=(*RUN_ONLY, *HOW))

    def _check_unused(self) -> None:
        """Refuse options that nobody would read."""
        used = {self.provider, self.judge}
        ignored = {
            "--endpoint": self.providers.endpoint is not None and "openai" not in used,
            "--model": self.providers.model is not None and not used & {"openai", "local"},
            "--neuronpedia": self.providers.neuronpedia is not None and self.provider != "neuronpedia",
            "--judge-model": self.scoring.judge_model is not None and self.judge not in ("openai", "local"),
            "--judge-endpoint": self.scoring.judge_endpoint is not None and self.judge != "openai",
        }
        for flag, unread in ignored.items():
            if unread:
                raise ConfigError(
                    f"{flag} does nothing with --provider {self.provider} --judge {self.judge}",
                    fix="Leave it out",
                )


def check_endpoint(address: str | None, allow_http: bool) -> None:
    """Refuse an address that would give text or a key away.

    Raises:
        ConfigError: It is no address, carries a key, or is plain http to another machine.
    """
    if address is None:
        return
    try:
        parts = urlsplit(address)
        host, _ = parts.hostname, parts.port
    except ValueError:
        parts, host = None, None
    bad = any(not (c.isascii() and c.isprintable()) or c.isspace() for c in address)
    if parts is None or bad or parts.scheme not in ("http", "https") or not host:
        raise ConfigError("--endpoint is no address of a server", expected="as in https://api.openai.com/v1")
    if parts.username is not None or parts.password is not None or parts.query or parts.fragment:
        # What stands there is likely a key, and the address is kept in the manifest.
        raise ConfigError(
            "--endpoint carries more than an address",
            expected="no user, password, ? or # in it",
            fix="Put the key into the variable that --key-variable names",
        )
    if parts.scheme == "http" and host not in LOOPBACK and not allow_http:
        raise ConfigError(
            f"http://{host} would get the text and the key unencrypted",
            expected="https, or http on this machine",
            fix="Use https, or pass --allow-http in a network that you trust",
        )


def _check_reach(flag: str, kind: str, model: str | None, endpoint: str | None) -> None:
    """What a provider or a judge cannot do without."""
    if kind in ("openai", "local") and not (model or "").strip():
        raise ConfigError(
            f"{flag} {kind} needs a model",
            expected="--model NAME"
            + (" as the server calls it" if kind == "openai" else ", a folder or a hub id"),
        )
    if kind == "openai" and endpoint is None:
        raise ConfigError(
            f"{flag} openai needs a server", expected="--endpoint, as in http://localhost:8000/v1"
        )
