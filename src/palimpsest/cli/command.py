"""What every verb shares: flags, config files, errors and exit codes."""

import errno
import json
import os
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cyclopts import App, CycloptsError, Parameter
from cyclopts.config import Dict

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
        suppress_keyboard_interrupt=False,
    )
    app["--help"].group = "Display"
    return app


def run_verb(verb: str, app: App, arguments: Sequence[str]) -> int:
    """Parse, run, and turn what went wrong into one paragraph and an exit code."""
    try:
        options, path = _options(arguments)
        app.config = (Dict(options, source=path, use_commands_as_keys=False),) if path else ()
        quiet, verbose = (
            f"--{flag}" in arguments or options.get(flag) is True for flag in ("quiet", "verbose")
        )
        log.setup(-1 if quiet else 1 if verbose else 0)
        if not arguments and app.default_command is None:
            names = ", ".join(f"palimpsest {verb} {name}" for name in app if not name.startswith("-"))
            raise ConfigError(f"'palimpsest {verb}' alone does nothing", expected=names)
        result = app(arguments, exit_on_error=False, print_error=False)
        return result if isinstance(result, int) else 0
    except PalimpsestError as error:
        return _fail(verb, str(error))
    except CycloptsError as error:
        # `out` is the one field without a default in the groups that have no name of their own.
        text = " ".join(str(error).split()).replace("arameter * requires", "arameter --out requires")
        return _fail(verb, f"{text} See palimpsest {verb} --help.")
    except KeyboardInterrupt:
        _say(
            f"palimpsest {verb}: interrupted. What is finished is kept; the same command with --resume goes on."
        )
        return 130
    except BrokenPipeError:
        # The reader has seen enough, as `| head` has; what is left in the buffer must not fail at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        return _fail(verb, f"The disk is full ({error.filename}). Free some space; --resume goes on.")
    except RuntimeError as error:
        if "can't allocate memory" in str(error):
            return _fail(verb, "There is not enough memory. Lower --buffer, --latents or --batch-size.")
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
        # Metadata of others may hold NaN, which is no JSON, and control codes beyond those that JSON escapes.
        plain = json.loads(json.dumps(data, default=str), parse_constant=lambda _: None)
        text_of = json.dumps(plain, ensure_ascii=False)
        sys.stdout.write(re.sub(r"[\x7f-\x9f]", lambda code: f"\\u{ord(code[0]):04x}", text_of) + "\n")
    elif not display.quiet:
        text()


def say(text: str = "") -> None:
    """Print a line for a person on standard output; control codes in it are shown, not obeyed."""
    sys.stdout.write(_shown(text) + "\n")


def print_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print a table on standard output, its first column to the left; control codes in it are shown, not obeyed."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(_shown(title)), title_justify="left")
    for place, name in enumerate(columns):
        table.add_column(Text(_shown(name)), justify="right" if place else "left")
    for row in rows:
        table.add_row(*(Text(_shown(cell)) for cell in row))
    width = None if log.console().is_terminal or "COLUMNS" in os.environ else 130
    Console(width=width, markup=False, emoji=False, highlight=False).print(table)


def _say(text: str) -> None:
    sys.stderr.write(_shown(text) + "\n")


def _shown(text: str) -> str:
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def _fail(verb: str, text: str) -> int:
    paragraph = re.sub(r"\s*\n\s*", " ", text)
    _say(f"palimpsest {verb}: {paragraph}")
    return 2


def _options(arguments: Sequence[str]) -> tuple[dict[str, Any], str]:
    """The content of `--config FILE`, and the file; flags and arguments that are given win over it."""
    place = next((i for i, a in enumerate(arguments) if a == "--config" or a.startswith("--config=")), None)
    if place is None:
        return {}, ""
    path = arguments[place].partition("=")[2] or "".join(arguments[place + 1 : place + 2])
    if not path:
        raise ConfigError("--config needs a file")
    options = {key.replace("_", "-"): value for key, value in load_config(path).items() if value is not None}
    if isinstance(options.get("task"), dict):
        options["task"] = [f"{name}={source}" for name, source in options["task"].items()]
    return {key: _token(value) for key, value in options.items()}, path


def _token(value: Any) -> Any:
    """A value as it would stand on the command line: text, except switches and lists."""
    if isinstance(value, list):
        return [_token(one) for one in value]
    return json.dumps(value) if isinstance(value, dict) else value if isinstance(value, bool) else str(value)
