"""`palimpsest steer` from the shell: what it prints, what it writes, what it refuses."""

from __future__ import annotations

import json

import pytest

from palimpsest.artifacts import open_artifact

MODELS = ("base", "tuned", "--dictionary", "sae", "--device", "cpu")
LATENT = ("--latent", "3:add=4")
PROMPT = ("--prompt", "the mill", "--max-new-tokens", "5")
SWEEP = ("--sweep", "0", "1", "--corpus", "math.jsonl", "--controls", "1", "--resamples", "100")


@pytest.fixture
def out(tmp_path):
    return tmp_path / "steer-run"


def test_as_a_process(workplace, command, out):
    hostile = "the mill \x1b[2J\u202e | [bold]<b>"
    latents = ("--latent", "3:add=4", "17:ablate")
    more = ("--watch", " river", "--prompts", workplace / "steer-prompts.txt")
    (workplace / "steer-prompts.txt").write_text("seven apples\n")
    shown = command("steer", *MODELS, *latents, *PROMPT, "--prompt", hostile, *SWEEP, *more, "--out", out)
    assert (shown.code, shown.err) == (0, ""), shown.err
    for words in (
        "3:add=4 17:ablate in the tuned model",
        "steered (tuned)",
        "perplexity ratio",
        "seven apples",
    ):
        assert words in shown.out, shown.out
    assert f"Written to {out}" in shown.out
    assert "\x1b" not in shown.out and "\u202e" not in shown.out, "text is shown, not obeyed"
    assert "[bold]" in shown.out
    artifact = open_artifact(out, stage="steer")
    assert set(artifact.files) == {"steer.json"}
    assert [row["prompt"] for row in artifact.read_json("steer.json")["prompts"]][1:] == [
        hostile,
        "seven apples",
    ]


def test_json_is_the_folders_content_and_a_finished_run_is_read(call, out):
    arguments = ("steer", *MODELS, *LATENT, *PROMPT, *SWEEP, "--side", "base", "--json", "--out", out)
    shown = call(*arguments)
    data = json.loads(shown.out)
    stored = open_artifact(out).read_json("steer.json")
    assert shown.code == 0 and data.pop("path") == str(out) and data == stored
    assert stored["side"] == "base" and [row["strength"] for row in stored["sweep"]] == [0, 1]
    again = call(*arguments, "--resume")
    assert json.loads(again.out)["sweep"] == stored["sweep"]
    refused = call(*arguments)
    assert refused.code == 2 and "--overwrite" in refused.err
    info = call("info", out)
    assert info.code == 0 and "steer (complete" in info.out


def test_one_model_and_a_file_of_options(call, out, tmp_path):
    options = tmp_path / "steer.toml"
    options.write_text(
        'dictionary = "sae"\nlatent = ["3:clamp=2.5"]\nprompt = ["the mill"]\nmax_new_tokens = 4\n'
    )
    shown = call("steer", "base", "--config", options, "--chat", "--seed", "3", "--json", "--out", out)
    data = json.loads(shown.out)
    assert shown.code == 0 and data["side"] == "base" and data["prompts"][0]["tuned"] is None, shown.err
    assert data["decoding"] == {"max_new_tokens": 4, "temperature": 0.0, "seed": 3, "chat": True}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((*MODELS, *PROMPT), "--latent"),
        ((*MODELS, *LATENT), "nothing to steer on"),
        ((*MODELS, "--latent", "64:ablate", *PROMPT), "no latent 64"),
        ((*MODELS, "--latent", "3:add=1", "3:ablate", *PROMPT), "changed twice"),
        ((*MODELS, "--latent", "3:add=nan", *PROMPT), "no number that a model"),
        ((*MODELS, "--latent", "3:amplify=2", *PROMPT), "no change 'amplify'"),
        ((*MODELS, *LATENT, *PROMPT, "--site", "resid_post.9"), "resid_post.9"),
        ((*MODELS, *LATENT, *PROMPT, "--sweep", "1"), "--corpus"),
        ((*MODELS, *LATENT, *PROMPT, "--corpus", "math.jsonl"), "--sweep"),
        ((*MODELS, *LATENT, *SWEEP, "--sweep", "-1"), "0 or more"),
        ((*MODELS, *LATENT, *SWEEP, "--sweep", "1"), "twice"),
        ((*MODELS, *LATENT, *SWEEP, "--watch", " a"), "--prompt"),
        ((*MODELS, *LATENT, *SWEEP, "--max-perplexity-ratio", "1"), "above 1"),
        ((*MODELS, *LATENT, *SWEEP[:3], "--corpus", "missing.jsonl"), "does not exist"),
        ((*MODELS, *LATENT, *PROMPT, "--temperature", "-1"), "negative"),
        ((*MODELS, *LATENT, "--prompts", "missing.txt"), "missing.txt"),
        ((*MODELS, *LATENT, "--prompt", "river " * 600), "no room"),
        (("base", *MODELS[2:], *LATENT, *PROMPT, "--side", "tuned"), "no tuned model"),
        (("nowhere/at/all", *MODELS[1:], *LATENT, *PROMPT), "nowhere"),
        ((*MODELS[:3], "nowhere/at/all", *LATENT, *PROMPT), "nowhere"),
    ],
)
def test_bad_input_is_one_paragraph(call, out, arguments, words):
    shown = call("steer", *arguments, "--out", out)
    assert (shown.code, shown.out, shown.err.count("\n")) == (2, "", 1), shown.err
    assert words in shown.err and not out.exists(), shown.err
