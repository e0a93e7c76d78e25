"""`palimpsest completion`."""

from collections.abc import Iterable
from importlib import import_module
from pathlib import PurePath
from types import UnionType
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin

from cyclopts import App, Parameter

from palimpsest.cli import VERBS
from palimpsest.cli.command import Display, emit, say, verb_app

app = verb_app("completion", VERBS["completion"].capitalize() + ".")

Shell = Literal["bash", "zsh", "fish"]

LONGEST = 76
"""Characters of a description beside a candidate."""


class Option(NamedTuple):
    """One flag of a verb.

    Attributes:
        names: As they are typed.
        help: In one line.
        takes: Values behind it: `none`, `one` or `many`.
        choices: The values that there are; empty where any may stand.
        files: Whether a value may be a path: text may, a number may not.
    """

    names: tuple[str, ...]
    help: str
    takes: Literal["none", "one", "many"]
    choices: tuple[str, ...]
    files: bool


class Place(NamedTuple):
    """What may follow a verb, or a verb and its sub-verb.

    Attributes:
        help: In one line.
        next: Sub-verbs, or values of the first argument, with their line of help.
        options: Its flags.
        files: Whether its arguments may be paths.
    """

    help: str
    next: dict[str, str]
    options: tuple[Option, ...]
    files: bool


@app.default
def completion(
    shell: Shell,
    *,
    display: Annotated[Display, Parameter(name="*")] = Display(),  # noqa: B008
) -> None:
    """Print the completion script of a shell; a file or a line of its start-up file keeps it.

    Args:
        shell: For which one.
        display: What is printed.
    """
    from palimpsest.cli.completion_scripts import script

    text = script(shell, places())

    def tell() -> None:
        for line in text.splitlines():
            say(line)

    emit(display, {"shell": shell, "script": text}, tell)


def places() -> dict[str, Place]:
    """Every verb and sub-verb, as typed, with what may follow it; the empty name is the command itself."""
    found = {
        "": Place(
            "",
            dict(VERBS),
            (
                Option(("--help", "-h"), "Show all verbs.", "none", (), False),
                Option(("--version", "-V"), "Show the version.", "none", (), False),
            ),
            files=False,
        )
    }
    for verb in VERBS:
        parser: App = import_module(f"palimpsest.cli.{verb}").app
        subverbs = [name for name in parser if not name.startswith("-")]
        lines = {name: _line(parser[name].help) for name in subverbs}
        found[verb] = _place(parser, (), lines)
        for name in subverbs:
            found[f"{verb} {name}"] = _place(parser, (name,), {})
    return found


def _place(parser: App, path: tuple[str, ...], subverbs: dict[str, str]) -> Place:
    _, apps, _ = parser.parse_commands(list(path))
    help_option = Option(("--help", "-h"), "Show this verb's flags.", "none", (), False)
    line = _line(apps[-1].help)
    if apps[-1].default_command is None:
        return Place(line, subverbs, (help_option,), files=False)
    # The parser's own defaults, such as no negative flags, reach a sub-verb through this stack only.
    with parser.app_stack(apps):
        arguments = [one for one in apps[-1].assemble_argument_collection(parse_docstring=True) if one.show]
        options = tuple(_option(one) for one in arguments if one.parse)
        first = next((one.get_choices(force=True) or () for one in arguments if one.index == 0), ())
        files = any(one.index is not None and _may_be_path(one.hint) for one in arguments)
    return Place(line, subverbs | dict.fromkeys(first, ""), (*options, help_option), files)


def _option(argument: Any) -> Option:
    flag = argument.is_flag() or bool in _types(argument.hint)
    many = argument.token_count()[1]
    return Option(
        tuple(name for name in argument.names if name.startswith("-")),
        _line(argument.parameter.help),
        "none" if flag else "many" if many else "one",
        () if flag else tuple(argument.get_choices(force=True) or ()),
        not flag and _may_be_path(argument.hint),
    )


def _types(hint: Any) -> set[Any]:
    """The plain types in a hint: those of a union, of a tuple's items."""
    origin = get_origin(hint)
    if origin is Annotated:
        return _types(get_args(hint)[0])
    if origin in (Union, UnionType, tuple, list):
        return set().union(*(_types(one) for one in get_args(hint)))
    return {hint}


def _may_be_path(hint: Any) -> bool:
    """Text may be a path: most models, corpora and dictionaries are a folder, a file or a hub id."""
    return any(isinstance(one, type) and issubclass(one, str | PurePath) for one in _types(hint))


def _line(text: str | None) -> str:
    """The first paragraph of a help in one short line without markup."""
    words = " ".join((text or "").strip().partition("\n\n")[0].replace("`", "").split())
    return words if len(words) <= LONGEST else words[: LONGEST - 1] + "…"


def names_of(options: Iterable[Option]) -> list[str]:
    """All names of some flags."""
    return [name for option in options for name in option.names]
