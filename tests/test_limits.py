"""Size limits of the package's source: what grows past them is split or shortened."""

from __future__ import annotations

import ast

import pytest

from helpers import PACKAGE

FILE_LINES = 350
FUNCTION_LINES = 60
ARGUMENTS = 8
METHODS = 20
VAGUE = {"utils", "util", "helpers", "helper", "manager", "runner", "misc", "common"}

Function = ast.FunctionDef | ast.AsyncFunctionDef
FILES = sorted(PACKAGE.rglob("*.py"))


def oversized(source: str) -> list[str]:
    """List what in one file is beyond a limit."""
    found = []
    if (lines := len(source.splitlines())) > FILE_LINES:
        found.append(f"{lines} lines, {FILE_LINES} allowed")
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, Function):
            lines = (node.end_lineno or 0) - node.lineno + 1
            if lines > FUNCTION_LINES:
                found.append(f"{node.name} has {lines} lines, {FUNCTION_LINES} allowed")
            if (count := arguments(node)) > ARGUMENTS:
                found.append(f"{node.name} takes {count} arguments, {ARGUMENTS} allowed")
        elif isinstance(node, ast.ClassDef):
            methods = sum(isinstance(item, Function) for item in node.body)
            if methods > METHODS:
                found.append(f"{node.name} has {methods} methods, {METHODS} allowed")
    return found


def arguments(node: Function) -> int:
    """Count a function's arguments, without self and cls."""
    named = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
    bound = bool(named) and named[0].arg in ("self", "cls")
    return len(named) - bound + (node.args.vararg is not None) + (node.args.kwarg is not None)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_within_the_limits(path):
    assert oversized(path.read_text()) == []


def test_no_module_has_a_name_that_says_nothing():
    assert [path for path in PACKAGE.rglob("*") if path.stem in VAGUE] == []


@pytest.mark.parametrize(
    ("source", "faults"),
    [
        ("x = 1\n" * FILE_LINES, 0),
        ("x = 1\n" * (FILE_LINES + 1), 1),
        ("def f():\n" + "    x = 1\n" * (FUNCTION_LINES - 1), 0),
        ("def f():\n" + "    x = 1\n" * FUNCTION_LINES, 1),
        ("def f(a, b, c, d, /, e, f, *, g, h): ...", 0),
        ("class A:\n    def f(self, a, b, c, d, e, f, g, h): ...", 0),
        ("def f(a, b, c, d, e, f, g, *rest, **named): ...", 1),
        ("class A:\n" + "".join(f"    def f{i}(self): ...\n" for i in range(METHODS)), 0),
        ("class A:\n" + "".join(f"    def f{i}(self): ...\n" for i in range(METHODS + 1)), 1),
    ],
)
def test_the_limits_are_enforced(source, faults):
    assert len(oversized(source)) == faults
