"""Logging and progress."""

import io
import logging

import pytest
from rich.console import Console

from palimpsest import log as log_module


@pytest.fixture
def terminal(monkeypatch):
    """A console that believes in a terminal, and an environment that does not ask for silence."""
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=True, width=120)
    monkeypatch.setattr(log_module, "console", lambda: console)
    monkeypatch.delenv("PALIMPSEST_QUIET", raising=False)
    yield stream
    log_module.quiet(False)


@pytest.fixture(autouse=True)
def _handlers():
    before, level = list(log_module.log.handlers), log_module.log.level
    yield
    log_module.log.handlers[:] = before
    log_module.log.setLevel(level)


def test_progress_shows_count_rate_and_unit(terminal):
    with log_module.progress("reading general", total=2_500, unit="tokens") as advance:
        advance(1_500)
        advance()
    shown = terminal.getvalue()
    assert "reading general" in shown
    assert "1.5k/2.5k tokens" in shown


def test_description_is_not_markup(terminal):
    with log_module.progress("corpus [bold]x[/bold]") as advance:
        advance()
    assert "[bold]x[/bold]" in terminal.getvalue()


@pytest.mark.parametrize("how", ["quiet", "environment", "no terminal"])
def test_progress_is_silent_when_asked_or_unwatched(terminal, monkeypatch, how):
    if how == "quiet":
        log_module.quiet()
    elif how == "environment":
        monkeypatch.setenv("PALIMPSEST_QUIET", "1")
    else:
        plain = Console(file=terminal, force_terminal=False)
        monkeypatch.setattr(log_module, "console", lambda: plain)
    with log_module.progress("reading", total=3) as advance:
        advance(3)
    assert terminal.getvalue() == ""


def test_progress_can_be_nested_and_ends_after_an_error(terminal):
    with pytest.raises(RuntimeError, match="inner"), log_module.progress("outer", total=2) as outer:
        with log_module.progress("first inner", total=2) as advance:
            advance()
        outer()
        with log_module.progress("second inner"):
            raise RuntimeError("inner")
    assert "first inner" in terminal.getvalue()
    with log_module.progress("after"):
        pass
    assert "after" in terminal.getvalue()


@pytest.mark.parametrize(
    ("verbosity", "shown"), [(-1, "error"), (0, "warning"), (1, "info"), (2, "debug"), (9, "debug")]
)
def test_verbosity_sets_what_is_logged(terminal, verbosity, shown):
    log_module.setup(verbosity)
    levels = {"debug": 10, "info": 20, "warning": 30, "error": 40}
    for name, level in levels.items():
        log_module.log.log(level, "this is %s", name)
    seen = [name for name in levels if f"this is {name}" in terminal.getvalue()]
    assert seen == [name for name in levels if levels[name] >= levels[shown]]


def test_setup_twice_does_not_log_twice(terminal):
    log_module.setup(1)
    log_module.setup(1)
    log_module.log.info("only once")
    assert terminal.getvalue().count("only once") == 1


def test_text_from_a_corpus_cannot_steer_the_terminal(terminal):
    log_module.setup(0)
    log_module.log.warning("token %s", "\x1b[2Jgone [red]x[/red]")
    assert "\x1b[2J" not in terminal.getvalue()
    assert "[red]x[/red]" in terminal.getvalue()


def test_library_is_silent_by_default():
    assert any(isinstance(handler, logging.NullHandler) for handler in log_module.log.handlers)
    assert log_module.log.name == "palimpsest"
