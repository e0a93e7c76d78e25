"""`palimpsest label` as a user meets it."""

from __future__ import annotations

import json
import signal
import threading
import time

import pytest

from label_world import honest, planted, said, serving
from latents_fixture import make_examples
from palimpsest.artifacts import open_artifact

KEY = "sk-secret-0123456789abcdef"


@pytest.fixture(scope="module")
def examples(tmp_path_factory):
    """Latent j fires on token j, and on nothing else."""
    return planted(tmp_path_factory.mktemp("label-cli") / "examples", [[j] for j in range(12)])


def _rows(path):
    return open_artifact(path).read_table("labels.parquet").to_pylist()


def test_labels_of_tokens_as_a_process(command, examples, tmp_path):
    shown = command("label", examples, "--provider", "tokens", "--top", 8, "--out", tmp_path / "run")
    assert shown.code == 0, shown.err
    assert 'fires on: " tok11"' in shown.out and "1.000 [0." in shown.out
    assert (
        "Balanced accuracy over 8 labels: 1.000" in shown.out
        and "With labels of other latents: 0." in shown.out
    )
    about = json.loads((tmp_path / "run" / "labels.json").read_text())
    assert (
        about["schema"] == 1 and about["provider"] == "tokens" and about["model"] is None and about["scored"]
    )
    assert about["examples"] == str(examples) and about["dictionary"] == {
        "path": "dictionary",
        "sha256": "0" * 64,
    }
    assert 0.4 < about["control"]["shuffled"] <= 0.5 and about["counts"]["labelled"] == 8
    assert [row["latent"] for row in _rows(tmp_path / "run")] == [11, 10, 9, 8, 7, 6, 5, 4]


def test_json_is_the_whole_result(call, examples, tmp_path):
    shown = call(
        "label", examples, "--provider", "tokens", "--latents", 3, 5, "--out", tmp_path / "run", "--json"
    )
    assert shown.code == 0 and shown.err == ""
    found = json.loads(shown.out)
    assert [row["latent"] for row in found["rows"]] == [3, 5] and found["score"]["mean"] == 1.0
    quiet = call("label", examples, "--provider", "tokens", "--top", 2, "--out", tmp_path / "two", "--quiet")
    assert quiet.code == 0 and quiet.out == quiet.err == ""


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--provider", "tokens", "--latents", "99"], "the dictionary has 12 latents"),
        (["--provider", "tokens", "--by", "nonsense"], "no column 'nonsense'"),
        (["--provider", "tokens", "--by", "label_score' OR 1=1"], "no column"),
        (["--provider", "nobody"], "nobody"),
        (["--provider", "openai", "--model", "m"], "needs a server"),
        (["--provider", "openai", "--model", "m", "--endpoint", "http://example.org/v1"], "unencrypted"),
        (
            ["--provider", "openai", "--model", "m", "--endpoint", "https://example.org/v1"],
            "no key in NONE_SUCH",
        ),
        (["--provider", "neuronpedia"], "no id at Neuronpedia"),
        (["--provider", "local"], "needs a model"),
        (["--provider", "local", "--model", "no/such/folder"], "no/such/folder"),
        (["--provider", "tokens", "--endpoint", "https://example.org/v1"], "does nothing"),
        (["--provider", "tokens", "--key-variable", KEY], "name of an environment variable"),
        (["--provider", "tokens", "--top", "0"], "--top"),
        ([], "--provider"),
    ],
)
def test_bad_input_is_one_clear_line(call, examples, tmp_path, arguments, problem):
    extra = [] if "--key-variable" in arguments else ["--key-variable", "NONE_SUCH"]
    shown = call("label", examples, *arguments, *extra, "--out", tmp_path / "run")
    assert shown.code == 2 and problem in shown.err and shown.err.count("\n") == 1 and shown.out == ""
    assert "Traceback" not in shown.err and KEY not in shown.err and not (tmp_path / "run").exists()


def test_folders_that_hold_no_examples_are_refused(call, tmp_path, examples):
    for path in (tmp_path / "missing", tmp_path):
        assert call("label", path, "--provider", "tokens", "--out", tmp_path / "run").code == 2
    done = ("label", examples, "--provider", "tokens", "--top", 2, "--out", tmp_path / "run")
    assert call(*done).code == 0
    shown = call("label", tmp_path / "run", "--provider", "tokens", "--out", tmp_path / "other")
    assert shown.code == 2 and "written by another verb" in shown.err
    shown = call(*done)
    assert shown.code == 2 and "already holds a finished run" in shown.err
    assert call(*done, "--resume").code == 0 and call(*done, "--overwrite").code == 0
    shown = call("label", examples, "--provider", "tokens", "--top", 3, "--out", tmp_path / "run", "--resume")
    assert shown.code == 2 and "config.top" in shown.err


def test_hostile_labels_and_tokens_are_shown_and_not_obeyed(call, tmp_path):
    path = make_examples(tmp_path / "examples", 30, 10, hostile=True)

    def answer(request):
        return said('{"label": "\\u001b[31m</script> [bold]red[/bold] \\u202eevil"}')

    for provider in ("tokens", "openai"):
        with serving(answer) as stub:
            reach = (
                ["--model", "m", "--endpoint", stub.address, "--judge", "none"]
                if provider == "openai"
                else []
            )
            shown = call(
                "label", path, "--provider", provider, *reach, "--top", 27, "--out", tmp_path / provider
            )
        assert shown.code == 0, shown.err
        assert not any(c in shown.out for c in "\x1b\u202e\u200b\x00")
    assert "[31m</script> [bold]red[/bold]" in shown.out and "carry no score" in shown.out


def test_a_dead_provider_keeps_what_it_said_and_resume_goes_on(
    command, call, examples, tmp_path, monkeypatch
):
    monkeypatch.setenv("MY_KEY", KEY)
    left = [6]

    def dying(request):
        left[0] -= 1
        return honest(request) if left[0] >= 0 else (401, {}, f'{{"error": "bad key {KEY}"}}'.encode())

    with serving(dying) as stub:
        run = ["label", examples, "--provider", "openai", "--model", "m", "--endpoint", stub.address]
        run += ["--key-variable", "MY_KEY", "--concurrency", "1", "--top", "8"]
        shown = command(*run, "--out", tmp_path / "run")
        assert (
            shown.code == 2 and "2 of 8 latents have no labels yet" in shown.err and "--resume" in shown.err
        )
        assert "401, the key is refused" in shown.err.replace("\n", " ") and shown.out == ""
        assert open_artifact(tmp_path / "run", allow_running=True).status == "running"
        stub.answer = honest
        resumed = call(*run, "--out", tmp_path / "run", "--resume")
        assert resumed.code == 0, resumed.err
        whole = call(*run, "--out", tmp_path / "whole")
        assert whole.code == 0 and _rows(tmp_path / "run") == _rows(tmp_path / "whole")
        assert all(head["Authorization"] == f"Bearer {KEY}" for head in stub.headers)
        for result in (shown, resumed, whole):
            assert KEY not in result.out + result.err
    for file in tmp_path.rglob("*"):
        assert file.is_dir() or KEY.encode() not in file.read_bytes(), file


def test_an_interrupted_run_ends_at_once_and_goes_on_later(start, call, examples, tmp_path):
    count, hanging, release = [0], threading.Event(), threading.Event()

    def hang(request):
        count[0] += 1
        if count[0] > 4:
            hanging.set()
            release.wait(60)
        return honest(request)

    with serving(hang) as stub:
        run = [
            "label",
            examples,
            "--provider",
            "openai",
            "--model",
            "m",
            "--endpoint",
            stub.address,
            "--top",
            "8",
        ]
        process = start(*run, "--out", tmp_path / "run")
        part = tmp_path / "run" / "parts" / "answers.jsonl"
        assert hanging.wait(60)
        ends = time.monotonic() + 30
        while (not part.exists() or part.read_bytes().count(b"\n") < 4) and time.monotonic() < ends:
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=30)
        release.set()
        assert process.returncode == 130 and "interrupted" in err and "Traceback" not in err, err
        assert part.read_bytes().count(b"\n") >= 4
        stub.answer = honest
        resumed = call(*run, "--out", tmp_path / "run", "--resume")
        assert resumed.code == 0 and len(_rows(tmp_path / "run")) == 8
        assert call(*run, "--out", tmp_path / "whole").code == 0
    assert _rows(tmp_path / "run") == _rows(tmp_path / "whole")


def test_help_names_every_option(call):
    shown = call("label", "--help")
    assert shown.code == 0
    for flag in (
        "--provider",
        "--judge",
        "--endpoint",
        "--key-variable",
        "--accept-partial",
        "--shuffles",
        "--by",
        "--out",
    ):
        assert flag in shown.out
