"""What every verb shares: flags, config files, errors and exit codes."""

import errno
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cyclopts import App, CycloptsError, Parameter

from palimpsest import log
from palimpsest.errors import ConfigError, PalimpsestError
from palimpsest.options import load_config


@Parameter(group="Display")
@dataclass(frozen=True, kw_only=True)
class Display:
    """What the command prints."""

    json: bool = False
    """Print the result as JSON on standard output."""

    quiet: bool = False
    """Print errors only."""

    verbose: bool = False
    """Say what is being done."""

    config: Path | None = None
    """Read options from a TOML, YAML or JSON file; flags on the command line win."""


def verb_app(verb: str, summary: str) -> App:
    """The parser of one verb."""
    app = App(
        name=f"palimpsest {verb}",
        help=summary,
        version_flags=[],
        default_parameter=Parameter(negative=(), consume_multiple=True),
        result_action="return_value",
    )
    app["--help"].group = "Display"
    return app


def run_verb(verb: str, app: App, arguments: Sequence[str]) -> int:
    """Parse, run, and turn what went wrong into one paragraph and an exit code."""
    try:
        tokens = _with_config(list(arguments))
        verbosity = -1 if "--quiet" in tokens else 1 if "--verbose" in tokens else 0
        log.setup(verbosity)
        result = app(tokens, exit_on_error=False, print_error=False)
        return result if isinstance(result, int) else 0
    except PalimpsestError as error:
        return _fail(verb, str(error))
    except CycloptsError as error:
        return _fail(verb, f"{' '.join(str(error).split())} See palimpsest {verb} --help.")
    except KeyboardInterrupt:
        _say(
            f"palimpsest {verb}: interrupted. What is finished is kept; the same command with --resume goes on."
        )
        return 130
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        return _fail(verb, f"The disk is full ({error.filename}). Free some space; --resume goes on.")
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":
            raise
        return _fail(
            verb,
            "The accelerator ran out of memory. Lower --tokens-per-batch, choose --dtype bfloat16, spread the models "
            "with --device-map auto, or hold one model at a time with --one-at-a-time.",
        )


def emit(display: Display, data: Any, text: Callable[[], None]) -> None:
    """Print a result: JSON on standard output when asked, else text for a person."""
    if display.json:
        sys.stdout.write(json.dumps(data, ensure_ascii=False, default=str) + "\n")
    elif not display.quiet:
        text()


def say(text: str = "") -> None:
    """Print a line for a person on standard output."""
    sys.stdout.write(text + "\n")


def _say(text: str) -> None:
    sys.stderr.write(text + "\n")


def _fail(verb: str, text: str) -> int:
    _say(f"palimpsest {verb}: {text}")
    return 2


def _with_config(arguments: list[str]) -> list[str]:
    """Put the options of `--config FILE` before the flags, except those that the flags set themselves."""
    place = next((i for i, a in enumerate(arguments) if a == "--config" or a.startswith("--config=")), None)
    if place is None:
        return arguments
    if arguments[place] == "--config":
        if place + 1 == len(arguments):
            raise ConfigError("--config needs a file")
        path, rest = arguments[place + 1], arguments[:place] + arguments[place + 2 :]
    else:
        path, rest = arguments[place].partition("=")[2], arguments[:place] + arguments[place + 1 :]
    given = {a.split("=")[0].removeprefix("--no-").removeprefix("--") for a in rest if a.startswith("--")}
    extra: list[str] = []
    for key, value in load_config(path).items():
        flag = key.replace("_", "-")
        if flag not in given:
            extra += _tokens(flag, value)
    return rest + extra


def _tokens(flag: str, value: Any) -> list[str]:
    """A config value as the flags that say the same."""
    if isinstance(value, bool):
        return [f"--{flag}"] if value else [f"--no-{flag}"] if flag == "loss" else []
    if isinstance(value, dict):
        if flag == "task":
            return [f"--{flag}", *(f"{name}={source}" for name, source in value.items())]
        return [token for name, inner in value.items() for token in _tokens(f"{flag}.{name}", inner)]
    if isinstance(value, list):
        return [f"--{flag}", *map(str, value)] if value else []
    return [] if value is None else [f"--{flag}", str(value)]
