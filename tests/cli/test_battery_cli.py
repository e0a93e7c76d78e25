"""The release gate through the command line: make, calibrate, look, audit, and the exit code."""

import json
import shutil
import signal
import time
from shlex import split

import pytest

from audit_fixture import make_audit
from audit_world import WORDS, write_corpus
from battery_world import sentences, teach
from palimpsest.audit.config import AuditConfig, CalibrationOptions
from palimpsest.cli.audit import _gate
from palimpsest.findings import AuditFinding
from palimpsest.options import RunOptions

MAKE = split(
    "battery make --base learned --dictionary sae --general g.jsonl --task letters=l.jsonl digits=d.jsonl "
    "--tokens-per-batch 1k --out bat"
)
CALIBRATE = split(
    "battery calibrate bat --nulls 12 --steps 10 20 --batch-size 4 --block-length 32 --full-lr 0.005 0.01 0.02 "
    "--lora-lr 2e-3 4e-3 --k-max 8 --workers 1 --tokens-per-batch 1k"
)
AUDIT = split("audit learned specialist --battery bat --resamples 200 --k-max 8 --tokens-per-batch 1k")
GATE = [*AUDIT, "--fail-on", "undeclared"]


@pytest.fixture(scope="module")
def text(workplace, tiny_llama, tiny_tokenizer):
    """A base that has learned three kinds of text, and a fine-tune that was trained hard on digits alone."""
    for name, words in WORDS.items():
        write_corpus(workplace / f"{name[0]}.jsonl", words, documents=40)
    lines = [line for seed, name in enumerate(WORDS) for line in sentences(name, 100, seed)]
    teach(tiny_llama(), workplace / "learned", tiny_tokenizer, lines, steps=100, lr=3e-3)
    digits = sentences("digits", 100, 50)
    teach(workplace / "learned", workplace / "specialist", tiny_tokenizer, digits, steps=80, lr=1e-3)
    return workplace


@pytest.fixture(scope="module")
def made(text, command):
    done = command(*MAKE, "--json")
    assert done.code == 0, done.err
    shutil.copytree(text / "bat", text / "blank")
    return done


@pytest.fixture(scope="module")
def stopped(made, start, text):
    """A calibration that was interrupted after its first nulls: its process, and what it left."""
    process = start(*CALIBRATE)
    cache, deadline = text / "bat" / "null-cache", time.monotonic() + 100

    def finished():
        return {path.name: path.stat().st_mtime_ns for path in cache.glob("*.safetensors")}

    while len(finished()) < 2 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    return process.returncode, out, err, finished()


@pytest.fixture(scope="module")
def calibrated(stopped, command):
    done = command(*CALIBRATE, "--json")
    assert done.code == 0, done.err
    return done


def test_make_describes_the_battery(made, text):
    assert made.out.count("\n") == 1 and made.err == ""
    said = json.loads(made.out)
    assert said["path"] == "bat" and said["calibration"] is None and said["loss"] is True
    assert [row["name"] for row in said["corpora"]] == ["general", "letters", "digits"]
    assert all((row["documents"], row["aside_documents"]) == (28, 12) for row in said["corpora"])


def test_an_interrupted_calibration_goes_on(stopped, calibrated, text):
    code, out, err, before = stopped
    assert (code, out) == (130, "") and 2 <= len(before) < 12
    assert "interrupted" in err and "the same command goes on" in err and "--resume" not in err
    assert f"{len(before)} of 12 nulls were made earlier" in calibrated.err
    said = json.loads(calibrated.out)
    assert len(said["calibration"]["nulls"]) == 12
    for name, written in before.items():
        assert (text / "bat" / "null-cache" / name).stat().st_mtime_ns == written, "a null was made again"


def test_show_and_list(calibrated, call):
    shown = call("battery", "show", "bat")
    assert (shown.code, shown.err) == (0, "")
    assert "12 nulls: 4 on general, 4 on letters, 4 on digits" in shown.out and "28 documents" in shown.out
    assert json.loads(call("battery", "show", "bat", "--json").out)["calibration"]["nulls"]
    assert "no nulls yet" in call("battery", "show", "blank").out
    listed = json.loads(call("battery", "list", "--json").out)
    assert [one["path"] for one in listed["batteries"]] == ["bat", "blank"]
    assert "original" in listed["presets"]
    plain = call("battery", "list")
    assert (plain.code, plain.err) == (0, "")
    assert "general, letters, digits; no nulls" in plain.out
    assert call("info", "bat").code == 0


def test_a_declared_fine_tune_passes_the_gate(calibrated, call, text):
    done = call(*GATE, "--declared", "digits", "--json", "--out", "declared")
    assert (done.code, done.err) == (0, "")
    said = json.loads(done.out)
    assert said == json.loads((text / "declared" / "audit.json").read_text())
    tasks = {task["name"]: task for task in said["tasks"]}
    assert tasks["digits"]["verdict"] == "declared-and-seen" and tasks["digits"]["kind"] == "specialised"
    assert tasks["letters"]["verdict"] == "clear"
    for task in tasks.values():
        fields = ("calibrated", "z", "p_null", "q", "kind", "declared", "verdict")
        assert all(task[key] is not None for key in fields)
    assert (text / "declared" / "report.html").stat().st_size > 10_000


def test_an_undeclared_one_fails_it(calibrated, command, text):
    done = command(*GATE, "--out", "undeclared")
    assert done.code == 3
    assert "gate failed, undeclared: digits" in done.err and "damaged" not in done.err
    assert "undeclared" in done.out and "Report: undeclared/report.html" in done.out
    assert (text / "undeclared" / "audit.json").exists(), "a failed gate still leaves its evidence"


def test_what_was_declared_in_a_config_file_counts(calibrated, call, text):
    (text / "gate.toml").write_text('battery = "bat"\ndeclared = ["digits"]\nfail_on = ["undeclared"]\n')
    plain = split("audit learned specialist --resamples 200 --k-max 8 --tokens-per-batch 1k")
    done = call(*plain, "--config", "gate.toml", "--quiet", "--out", "from-config")
    assert (done.code, done.err) == (0, "")


def test_without_a_gate_the_exit_code_is_0(calibrated, call):
    done = call(*AUDIT, "--out", "no-gate")
    assert done.code == 0 and "undeclared" in done.out


def test_without_nulls_figures_are_raw(made, call):
    blank = [one if one != "bat" else "blank" for one in AUDIT]
    done = call(*blank, "--out", "raw")
    assert done.code == 0 and "has no nulls" in done.out and "Raw figures" in done.out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("audit learned specialist --battery bat --declared history --out bad", "history"),
        ("audit learned specialist --battery bat --general g.jsonl --out bad", "--general"),
        ("audit learned specialist --battery nowhere --out bad", "There is no folder nowhere"),
        ("audit learned specialist --battery blank --fail-on undeclared --out bad", "has no nulls"),
        ("audit learned specialist --battery bat --fail-on everything --out bad", "everything"),
        ("audit learned specialist --battery bat --fail-on damaged --no-loss --out bad", "losses"),
        (
            "audit learned specialist --battery bat --fail-on undeclared --alpha 0.001 --out bad",
            "Too few nulls",
        ),
        ("audit base tuned --battery bat --out bad", "another base"),
        ("audit learned specialist --fail-on undeclared --out bad", "needs a battery"),
        ("battery make --base learned --dictionary sae --general g.jsonl --out bad", "at least one task"),
        (
            "battery make --base learned --dictionary sae --general g.jsonl --task no=no.jsonl --out bad",
            "no.jsonl",
        ),
        (
            "battery make --base learned --dictionary sae --general g.jsonl --task d=d.jsonl --out bat",
            "--overwrite",
        ),
        ("battery calibrate nowhere", "There is no folder nowhere"),
        ("battery calibrate bat --null-corpus no=no.jsonl", "no.jsonl"),
        ("battery calibrate bat --nulls 0", "positive"),
        ("battery show sae", "another verb"),
        ("battery list nowhere", "nowhere"),
        ("battery", "palimpsest battery make"),
    ],
)
def test_bad_input_exits_with_2(calibrated, call, text, arguments, said):
    done = call(*split(arguments))
    assert (done.code, done.out) == (2, "")
    assert said in done.err and done.err.count("\n") == 1 and "Traceback" not in done.err
    assert not (text / "bad").exists()


def gate(tmp_path, fail_on, *, refused=False, calibrated=True):
    options = CalibrationOptions(battery="battery", fail_on=fail_on)
    config = AuditConfig("base", "tuned", run=RunOptions(out=tmp_path), calibration=options)
    result = make_audit(calibrated=calibrated, refused=refused)
    assert (AuditFinding.from_dict(result).calibration is None) != calibrated
    return _gate(config, result)


@pytest.mark.parametrize(
    ("fail_on", "refused", "code", "said"),
    [
        ((), False, 0, {}),
        ((), True, 0, {}),
        (("undeclared",), False, 3, {"undeclared": "web"}),
        (("damaged",), False, 3, {"damaged": "code"}),
        (("undeclared", "damaged"), False, 3, {"undeclared": "web", "damaged": "code"}),
        (("undeclared",), True, 3, {"without a verdict": "web"}),
        (("damaged",), True, 3, {"damaged": "code", "without a verdict": "web"}),
    ],
)
def test_what_the_gate_says(tmp_path, capsys, fail_on, refused, code, said):
    assert gate(tmp_path, fail_on, refused=refused) == code
    lines = [f"palimpsest audit: gate failed, {reason}: {name}" for reason, name in said.items()]
    assert capsys.readouterr().err.splitlines() == lines


def test_a_gate_without_a_calibration_fails(tmp_path, capsys):
    assert gate(tmp_path, ("undeclared",), calibrated=False) == 3
    assert "there is no verdict" in capsys.readouterr().err
    assert gate(tmp_path, (), calibrated=False) == 0
