"""`palimpsest evaluate` from the shell: what it prints, what it writes, what it refuses."""

from __future__ import annotations

import json

import pytest

from palimpsest.artifacts import open_artifact
from palimpsest.evaluate import Evaluation

TEXT = ("--corpus", "general.jsonl", "math.jsonl", "--resamples", "100")


@pytest.fixture
def out(tmp_path):
    return tmp_path / "evaluation"


@pytest.fixture(scope="module")
def diff_sae(workplace):
    """Add a dictionary of the difference to the folder."""
    import torch

    from palimpsest.dictionaries import Dictionary

    torch.manual_seed(2)
    Dictionary(32, 64, k=8, view="diff", metadata={"site": "resid_post.0"}).save_pretrained(
        workplace / "diff-sae"
    )


def test_as_a_process(command, out):
    shown = command("evaluate", "sae", "--model", "base", *TEXT, "--tokens", "1k", "--out", out)
    assert (shown.code, shown.err) == (0, ""), shown.err
    title = "64 latents (topk, k 8, view base) at resid_post.0"
    for words in (title, "model: base", "FVE", "CE recovered against mean"):
        assert words in shown.out, shown.out
    assert "content tokens" in shown.out and f"Written to {out}" in shown.out
    assert set(open_artifact(out, stage="evaluation").files) == {"evaluation.json", "density.parquet"}


def test_bad_input_as_a_process(command, out):
    shown = command("evaluate", "sae", "--model", "base", *TEXT, "--site", "resid_post.9", "--out", out)
    assert (shown.code, shown.out, shown.err.count("\n")) == (2, "", 1)
    assert shown.err.startswith("palimpsest evaluate: ") and "layers run from 0 to 1" in shown.err
    assert not out.exists()


def test_json_is_the_folders_content(call, out):
    shown = call("evaluate", "sae", "--base", "base", "--tuned", "tuned", *TEXT, "--json", "--out", out)
    data = json.loads(shown.out)
    stored = open_artifact(out).read_json("evaluation.json")
    assert shown.code == 0 and Evaluation.from_dict(data) == Evaluation.from_dict(stored)
    assert [one["side"] for one in data["models"]] == ["base", "tuned"] and data["path"] == str(out)
    again = call(
        "evaluate", "sae", "--base", "base", "--tuned", "tuned", *TEXT, "--resume", "--json", "--out", out
    )
    assert json.loads(again.out) == data
    info = call("info", out)
    assert "evaluation (complete" in info.out and "CE recovered" in info.out and "resid_post.0" in info.out


def test_a_diff_dictionary_has_one_column(call, diff_sae, out):
    shown = call("evaluate", "diff-sae", "--base", "base", "--tuned", "tuned", *TEXT, "--out", out)
    assert shown.code == 0 and "tuned: tuned" in shown.out and "base: base" not in shown.out


def test_without_losses(call, out):
    shown = call("evaluate", "sae", "--model", "base", *TEXT, "--no-loss", "--out", out)
    assert shown.code == 0 and "FVE" in shown.out and "CE spliced" not in shown.out
    assert open_artifact(out).read_json("evaluation.json")["models"][0]["splice"] is None


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("sae", "--model", "base", "--site", "mlp_act.0"), "width 64"),
        (("sae", "--model", "base", "--site", "nonsense"), "no site 'nonsense'"),
        (("sae", "--model", "base", "--base", "base"), "--model and --base"),
        (("sae", "--base", "base"), "--tuned TUNED"),
        (("sae",), "--model MODEL"),
        (("sae", "--model", "nowhere/at/all"), "nowhere/at/all"),
        (("nowhere", "--model", "base"), "nowhere"),
        (("diff-sae", "--model", "base"), "view diff"),
        (("diff-sae", "--base", "base", "--tuned", "tuned", "--one-at-a-time"), "one-at-a-time"),
        (("sae", "--model", "base", "--tokens", "none"), "--tokens"),
        (("sae", "--model", "base", "--device", "cuda:99"), "cuda:99"),
    ],
)
def test_bad_input_is_one_paragraph_and_leaves_nothing(call, diff_sae, out, arguments, words):
    shown = call("evaluate", *arguments, *TEXT, "--out", out)
    assert shown.code == 2 and shown.out == "" and words in shown.err
    assert shown.err.startswith("palimpsest evaluate: ") and not out.exists()


@pytest.mark.parametrize(
    ("text", "words"), [("absent.jsonl", "absent.jsonl"), ("hollow.jsonl", "no rows with text")]
)
def test_text_that_cannot_be_read(call, workplace, out, text, words):
    (workplace / "hollow.jsonl").write_text('{"text": ""}\n')
    shown = call("evaluate", "sae", "--model", "base", "--corpus", text, "--out", out)
    assert shown.code == 2 and words in shown.err and not out.exists()


def test_a_finished_folder_is_not_overwritten(call, out):
    arguments = ("evaluate", "sae", "--model", "base", *TEXT, "--no-loss", "--out", out)
    assert call(*arguments).code == 0
    before = (out / "manifest.json").read_bytes()
    shown = call(*arguments)
    assert shown.code == 2 and "--overwrite" in shown.err and (out / "manifest.json").read_bytes() == before
    assert call(*arguments, "--overwrite").code == 0
