"""What a shell offers after TAB: the script is written, read by the shell and asked."""

import json
import os
import shutil
import subprocess

import pytest

from palimpsest.cli import VERBS, main
from palimpsest.cli.completion import Option, Place, places
from palimpsest.cli.completion_scripts import script

BASH = shutil.which("bash")
needs_bash = pytest.mark.skipif(BASH is None, reason="bash is not installed")


@pytest.fixture(scope="module")
def found():
    return places()


@pytest.fixture(scope="module")
def bash_script(found, tmp_path_factory):
    path = tmp_path_factory.mktemp("completion") / "palimpsest.bash"
    path.write_text(script("bash", found), encoding="utf-8")
    return path


@pytest.fixture
def complete(bash_script, tmp_path):
    """Return what bash has in COMPREPLY for words of which the last is being typed."""

    def run(*words: str, source=bash_script) -> list[str]:
        code = (
            f'source {source}; COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); _palimpsest; '
            "printf '%s\\n' \"${COMPREPLY[@]}\""
        )
        command = [str(BASH), "--norc", "--noprofile", "-c", code, "bash", "palimpsest", *words]
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=30, check=False, cwd=tmp_path, env={"PATH": ""}
        )
        assert done.stderr == "" and done.returncode == 0
        return done.stdout.split()

    return run


def test_every_verb_and_its_sub_verbs_have_a_place(found):
    assert set(found) >= {"", *VERBS}
    assert set(found[""].next) == set(VERBS)
    assert {"train sae", "battery make", "tune sweep", "explain compare"} <= set(found)
    for name in found:
        verb, _, sub = name.partition(" ")
        assert not sub or sub in found[verb].next


def test_every_flag_of_the_help_is_offered(found, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    for name, place in found.items():
        if not name:
            continue
        main([*name.split(), "--help"])
        shown = capsys.readouterr().out
        rows = [line.strip("│* ").split() for line in shown.splitlines() if line.startswith("│")]
        flags = {word.rstrip(",") for row in rows for word in row[:6] if word.startswith("--")}
        offered = {one for option in place.options for one in option.names}
        assert flags <= offered, f"{name}: {sorted(flags - offered)}"
        # A parser's own defaults reach its sub-verbs: there is no such flag.
        assert "--no-resume" not in offered


def test_what_a_flag_takes(found):
    def option(place: str, name: str) -> Option:
        return next(one for one in found[place].options if name in one.names)

    assert option("audit", "--resume")[2:] == ("none", (), False)
    assert option("audit", "--seed")[2:] == ("one", (), False)
    assert option("audit", "--dictionary")[2:] == ("one", (), True)
    assert option("audit", "--out")[2:] == ("one", (), True)
    assert option("audit", "--task")[2:] == ("many", (), True)
    assert option("audit", "--fail-on")[2:] == ("many", ("undeclared", "damaged"), False)
    assert option("tune sweep", "--prepend-bos")[2:] == ("none", (), False)
    assert all(len(one.help) <= 76 and "\n" not in one.help for one in found["audit"].options)
    assert "Args" not in found["battery"].next["show"]


@needs_bash
@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["au"], ["audit"]),
        (["--v"], ["--version"]),
        (["battery", ""], ["make", "calibrate", "show", "list"]),
        (["train", "s"], ["sae"]),
        (["audit", "--dt"], ["--dtype"]),
        (["audit", "--dtype", "fl"], ["float32", "float16"]),
        (["audit", "--dtype", "=", "fl"], ["float32", "float16"]),
        (["audit", "--dtype", "float32", "fl"], []),
        (["audit", "base", "tuned", "--fail-on", "undeclared", "d"], ["damaged"]),
        (["audit", "--json", "d"], []),
        (["completion", ""], ["bash", "zsh", "fish"]),
        (["battery", "make", "--keep"], ["--keep-activations"]),
        # A folder may be called like a verb.
        (["report", "audit", "--js"], ["--json"]),
        (["info", "train", "sae", "--js"], ["--json"]),
        (["audit", "x", "battery", "--dtype", "b"], ["bfloat16"]),
        (["nonsense", ""], []),
        (["audit", "$(touch ran)`touch ran`;", "--dt"], ["--dtype"]),
        (["audit", "--dtype", "$(touch ran)"], []),
    ],
    ids=" ".join,
)
def test_bash_completes(words, expected, complete, tmp_path):
    assert complete(*words) == expected
    assert list(tmp_path.iterdir()) == []


@needs_bash
def test_bash_completes_every_verb(complete):
    assert complete("") == list(VERBS)


@needs_bash
def test_bash_completes_every_flag_of_every_place(found, complete):
    for name, place in found.items():
        offered = [flag for option in place.options for flag in option.names]
        assert complete(*name.split(), "-") == offered, name


@needs_bash
def test_bash_offers_files_where_a_path_may_stand(bash_script, tmp_path):
    """Readline itself completes files where the function gives nothing and has not switched that off."""
    (tmp_path / "corpus-of-math.jsonl").touch()
    lines = {
        "palimpsest audit base tuned --task math=corpus-": True,
        "palimpsest audit corpus-": True,
        "palimpsest audit base tuned --seed corpus-": False,
        "palimpsest audit --dtype corpus-": False,
        "palimpsest corpus-": False,
    }
    for line, expected in lines.items():
        shown = _typed(f"source {bash_script}\n", f"{line}\t", tmp_path)
        assert ("corpus-of-math.jsonl" in shown) == expected, line


def _typed(setup: str, line: str, folder) -> str:
    """What an interactive bash shows after a line is typed; nothing is run."""
    import pty
    import select
    import time

    child, terminal = pty.fork()
    if child == 0:
        os.chdir(folder)
        environment = {"PATH": "", "PS1": "", "TERM": "dumb", "HOME": str(folder), "COLUMNS": "200"}
        os.execve(str(BASH), ["bash", "--norc", "--noprofile", "-i"], environment)
    shown = ""

    def read(until: str, seconds: float) -> None:
        nonlocal shown
        end = time.monotonic() + seconds
        while time.monotonic() < end and until not in shown:
            if select.select([terminal], [], [], 0.05)[0]:
                shown += os.read(terminal, 65536).decode(errors="replace")

    try:
        os.write(terminal, f"{setup}echo rea''dy\n".encode())
        read("ready", 20)
        shown = ""
        # Ctrl-A goes to the start of the line: what is shown then is complete, whatever TAB did.
        os.write(terminal, f"{line}".encode())
        read("corpus-of-math.jsonl", 1.5)
    finally:
        os.close(terminal)
        os.waitpid(child, 0)
    return shown


def _installed(shell: str) -> str:
    program = shutil.which(shell)
    if program is None:
        pytest.skip(f"{shell} is not installed")
    return program


def test_fish_completes(found, tmp_path):
    program = _installed("fish")
    (tmp_path / "script").write_text(script("fish", found), encoding="utf-8")
    (tmp_path / "corpus-of-math.jsonl").touch()
    expected = {
        "au": ["audit"],
        "train s": ["sae"],
        "audit --dt": ["--dtype"],
        "audit --dtype fl": ["float16", "float32"],
        "report audit --js": ["--json"],
        "audit base corpus-": ["corpus-of-math.jsonl"],
        "audit --seed corpus-": [],
    }
    for line, found_ in expected.items():
        code = f"source script; complete -C 'palimpsest {line}' | string split -f1 \\t"
        done = subprocess.run(
            [program, "--no-config", "-c", code], capture_output=True, text=True, timeout=60, cwd=tmp_path
        )
        assert done.stdout.split() == found_, line


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_shell_can_read_its_script(shell, found, tmp_path):
    program = _installed(shell)
    path = tmp_path / "script"
    path.write_text(script(shell, found), encoding="utf-8")
    done = subprocess.run([program, "-n", path], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_quotes_in_help_stay_quotes(shell, tmp_path):
    """A help text cannot end its string and become a command."""
    hostile = "it's \\' $(touch ran) `touch ran` \"; touch ran"
    option = Option(("--flag",), hostile, "one", ("a'b", "$(touch ran)", "fine"), False)
    verb = Place(hostile, {"sub": hostile}, (option,), True)
    made = {"": Place("", {"verb": hostile}, (), False), "verb": verb, "verb sub": verb}
    text = script(shell, made)
    program = _installed(shell)
    path = tmp_path / "script"
    path.write_text(text + ("compdef() { :; }\n" if shell == "zsh" else ""), encoding="utf-8")
    done = subprocess.run(
        [program, path], capture_output=True, text=True, timeout=60, check=False, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert [one.name for one in tmp_path.iterdir()] == ["script"]
    assert "fine" in text and "a'b" not in text.replace("'\\''", "'")


def test_the_verb_prints_the_script(found, capsys):
    assert main(["completion", "fish"]) == 0
    shown = capsys.readouterr()
    assert shown.out == script("fish", found) and shown.err == ""
    assert main(["completion", "bash", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["script"] == script("bash", found)


def test_another_shell_is_refused(capsys):
    assert main(["completion", "tcsh"]) == 2
    shown = capsys.readouterr()
    assert "zsh" in shown.err and shown.out == ""
