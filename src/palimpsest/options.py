"""Option groups that several stages share, and the small conversions behind flags and config files.

Every field's docstring is its help text on the command line; this module never imports torch.
"""

import dataclasses
import json
import math
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Parameter

from palimpsest.errors import ConfigError

RUN_ONLY = ("out", "resume", "overwrite", "fail_on")
"""Fields that say where a stage runs and what follows, not what it computes: they never enter a config hash."""

ADDED = ("dialogue",)
"""Fields that came later and change nothing unless set: unset they stay out, and older runs keep their hash."""

Dtype = Literal["auto", "float32", "bfloat16", "float16"]

FLAT = Parameter(name="*")
"""Puts the fields of an option group beside the command's own flags."""


def _count(_: object, tokens: Any) -> int:
    return parse_count(tokens[0].value, tokens[0].keyword.strip("[]"))


def _number(_: object, tokens: Any) -> int | float:
    text = tokens[0].value
    value = int(text) if re.fullmatch(r"[+-]?\d+", text) else float(text)
    if not math.isfinite(value):
        raise ValueError("it is not finite")
    return value


def _mapping(_: object, tokens: Any) -> Any:
    """`--x '{"a": 1}'`, or `--x.a 1`, whose tokens come as a mapping; values are JSON where they can be."""
    if isinstance(tokens, Mapping):
        return {key: _mapping(_, inner) for key, inner in tokens.items()}
    text, inside = tokens[0].value, bool(tokens[0].keys)
    try:
        value = json.loads(text)
    except ValueError:
        value = text
    if not inside and not isinstance(value, dict):
        raise ValueError("it is no JSON object")
    return value


Count = Annotated[int, Parameter(converter=_count)]
"""A whole number that a user may write as 20k or 2M."""

# cyclopts tries the members of a union in turn, and its `int` rounds 0.5 to 0.
Number = Annotated[int | float, Parameter(converter=_number)]
"""A number that keeps its decimals."""


@Parameter(group="Models")
@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """How models are loaded."""

    dtype: Dtype = "auto"
    """Weights and activations: the checkpoint's own type with `auto`, else float32, bfloat16 or float16."""

    device: str | None = None
    """Where a model runs, e.g. `cuda:0`; the default is a GPU when there is one."""

    device_map: str | None = None
    """Spread each model over several devices (`auto`, `balanced`, …), as transformers does."""

    revision: str | None = None
    """Revision of the base model (hub models)."""

    tuned_revision: str | None = None
    """Revision of the tuned model; with the same model id on both sides this compares two revisions."""

    load_kwargs: Annotated[dict[str, Any], Parameter(converter=_mapping, n_tokens=1)] = field(
        default_factory=dict
    )
    """Further `from_pretrained` arguments, as JSON or one by one: `--load-kwargs.attn_implementation eager`."""

    trust_remote_code: bool = False
    """Run Python code that a checkpoint ships. Off, because it executes whatever the author wrote."""

    force_base: bool = False
    """Read an adapter on a base that is not the one its configuration names."""

    one_at_a_time: bool = False
    """Hold one model in memory at a time: the base's readings are spooled to disk, then the tuned model runs."""

    tokens_per_batch: Count = 4096
    """Padded tokens in one forward pass."""


@Parameter(group="Text")
@dataclass(frozen=True, kw_only=True)
class CorpusOptions:
    """Which text is read and which of its tokens are measured."""

    max_length: Count = 512
    """Tokens of a document that are read; the rest is cut off."""

    max_documents: Annotated[int | None, Parameter(converter=_count)] = None
    """Documents read from each corpus; all of them by default."""

    text_field: str = "text"
    """Field of a row that holds plain text."""

    messages_field: str = "messages"
    """Field of a row that holds a conversation; rendered with the model's chat template."""

    answer_chars: Annotated[int | None, Parameter(converter=_count)] = None
    """Keep only the first N characters of each assistant message (the original method used 100)."""

    roles: tuple[str, ...] | None = None
    """Measure only tokens of these roles (`user`, `assistant`, `system`, `tool`, `text`)."""

    dialogue: tuple[str, ...] = ()
    """Two marks, as in `--dialogue 'User:' 'Assistant:'`: in plain text the user speaks after the first, the assistant
    after the second."""

    skip_bad_rows: bool = False
    """Count rows that cannot be read instead of stopping at the first."""

    prepend_bos: Annotated[bool | None, Parameter(negative="--no-prepend-bos")] = None
    """Begin each document with the tokenizer's BOS; by default when the tokenizer has one."""

    split: str = "train"
    """Split of a Hugging Face data set."""

    all_positions: bool = False
    """Measure BOS, special and chat-template tokens too."""


@Parameter(group="Output")
@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """Where a stage writes and how it restarts."""

    out: Path
    """Folder that the results go to."""

    resume: bool = False
    """Continue an interrupted run of the same command in that folder."""

    overwrite: bool = False
    """Replace an earlier run in that folder."""

    seed: int = 0
    """Seed of every random choice."""

    def __post_init__(self) -> None:
        """Refuse a seed that no generator takes."""
        if not 0 <= self.seed < 2**63:
            raise ConfigError(
                "The seed is out of range", expected="a whole number from 0 to 2^63 - 1", found=self.seed
            )


def parse_count(text: str | int, option: str | None = None) -> int:
    """A count with an optional suffix: `512`, `20k`, `2M`, `1.5B`; errors name the `option` it was given for.

    Raises:
        ConfigError: When it is no positive count.
    """
    match = re.fullmatch(r"\s*(\d+(?:[._]\d+)*)\s*([kKmMbBgG]?)\s*", str(text))
    scale = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "g": 10**9}
    value = float(match[1].replace("_", "")) * scale[match[2].lower()] if match else 0.0
    if value < 1 or value != int(value):
        raise ConfigError(
            f"'{text}' is no count" + (f" for {option}" if option else ""),
            expected="a positive whole number, k, M and B allowed, as in 2M",
        )
    return int(value)


def parse_assignment(text: str) -> tuple[str, str]:
    """`NAME=FILE` as a pair; a bare file is named after its stem.

    Raises:
        ConfigError: When the name or the file is empty.
    """
    name, separator, source = text.partition("=")
    if not separator:
        name, source = Path(text).name.split(".")[0], text
    if not name.strip() or not source.strip():
        raise ConfigError(f"'{text}' names no corpus", expected="NAME=FILE, as in math=math.jsonl")
    return name.strip(), source.strip()


def check_names(names: Sequence[str]) -> None:
    """Refuse task corpora that share a name, or that are called like the general one.

    Raises:
        ConfigError: They do.
    """
    if len({*names, "general"}) != len(names) + 1:
        raise ConfigError(
            "Corpora need different names",
            expected="a name per task, none of them 'general'",
            found=", ".join(names),
        )


def load_config(path: str | Path) -> dict[str, Any]:
    """Read a TOML, YAML or JSON file of options.

    Raises:
        ConfigError: When it is missing, cannot be parsed or holds no mapping.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".toml":
            loaded = tomllib.loads(text)
        elif path.suffix in {".yaml", ".yml"}:
            import yaml

            loaded = yaml.safe_load(text)
        elif path.suffix == ".json":
            loaded = json.loads(text)
        else:
            raise ConfigError(f"Cannot tell the format of {path}", expected="a .toml, .yaml or .json file")
    except OSError as error:
        raise ConfigError(f"Cannot read the config file {path}", found=error.strerror) from error
    except ValueError as error:
        raise ConfigError(f"Cannot parse the config file {path}", found=str(error)) from error
    except Exception as error:
        if type(error).__module__.split(".")[0] == "yaml":
            raise ConfigError(f"Cannot parse the config file {path}", found=str(error)) from error
        raise
    if not isinstance(loaded, dict):
        raise ConfigError(f"{path} holds no options", expected="a mapping", found=type(loaded).__name__)
    return {str(key).replace("-", "_"): value for key, value in loaded.items()}


def as_flags(config: Any, *, positional: tuple[str, ...] = ()) -> list[str]:
    """The command-line arguments that say the same as a config, defaults left out."""
    arguments = [str(getattr(config, name)) for name in positional]
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        default = f.default_factory() if f.default_factory is not dataclasses.MISSING else f.default
        flag = f"--{f.name.replace('_', '-')}"
        if dataclasses.is_dataclass(value):
            arguments += as_flags(value)
        elif f.name in positional or f.name in ("resume", "overwrite") or value == default:
            continue
        elif isinstance(value, bool):
            arguments.append(flag if value else f"--no-{f.name.replace('_', '-')}")
        elif isinstance(value, dict):
            arguments += [flag, json.dumps(value)]
        else:
            arguments += [flag, *(map(str, value) if isinstance(value, tuple) else [str(value)])]
    return arguments


def config_dict(config: object, *, drop: tuple[str, ...] = RUN_ONLY) -> dict[str, Any]:
    """A config dataclass as plain JSON values, without the fields that do not change the result."""

    def plain(value: object) -> Any:
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            named = {f.name: getattr(value, f.name) for f in dataclasses.fields(value) if f.name not in drop}
            return {name: plain(one) for name, one in named.items() if one or name not in ADDED}
        if isinstance(value, Mapping):
            return {str(k): plain(v) for k, v in value.items()}
        if isinstance(value, (list, tuple)):
            return [plain(v) for v in value]
        return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)

    return plain(config)
