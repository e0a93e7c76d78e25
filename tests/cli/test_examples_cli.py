"""`palimpsest examples` from the command line: what it prints, what it writes, and what it refuses."""

from __future__ import annotations

import json
import signal
import time

import pytest

from palimpsest.dictionaries import Dictionary
from palimpsest.latents import LatentIndex

CORPORA = ("--corpus", "general=general.jsonl", "math=math.jsonl")
RUN = ("examples", "base", "tuned", "--dictionary", "sae", *CORPORA)


def test_a_run_and_its_summary(call, workplace):
    found = call(*RUN, "--out", "ex-run")
    assert found.code == 0, found.err
    assert "latents fire on" in found.out and "rate base" in found.out and "Written to ex-run" in found.out
    index = LatentIndex.open(workplace / "ex-run")
    assert len(index) > 10 and list(index.about["corpora"]) == ["general", "math"]


def test_json_for_machines(call):
    found = call(*RUN, "--out", "ex-json", "--tops", 3, "--bins", 0, "--no-lens", "--tokens", "1k", "--json")
    assert found.code == 0, found.err
    about = json.loads(found.out)
    assert about["tops"] == 3 and about["alive"] > 10 and about["path"] == "ex-json"
    assert {"latent", "rate_base", "rate_tuned", "tokens"} <= about["strongest"][0].keys()


def test_one_model(call):
    found = call("examples", "base", "--dictionary", "sae", *CORPORA, "--out", "ex-lone")
    assert found.code == 0, found.err
    assert "fire most often" in found.out


def test_hostile_text_stays_inert(call, workplace):
    rows = [{"text": "\x1b[31m\x1b]0;owned\x07 \u202e </script> " * 4}, {"text": "a mill"}]
    (workplace / "ex-hostile.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = call(*RUN[:5], "--corpus", "\x1b[31mred=ex-hostile.jsonl", "--out", "ex-hostile")
    assert found.code == 0, found.err
    assert "\x1b" not in found.out and "\u202e" not in found.out


def test_a_killed_run_resumes(start, call, workplace):
    """Killed once a part of the text is done, and run again: the same tables as without."""
    (workplace / "ex-long.jsonl").write_text(
        "".join(json.dumps({"text": f"seven apples {n} and the mill " * 12}) + "\n" for n in range(600))
    )
    arguments = [*RUN[:5], "--corpus", "ex-long.jsonl"]
    process = start(*arguments, "--out", "ex-cut")
    chunks, deadline = workplace / "ex-cut" / "parts" / "chunks", time.monotonic() + 60
    while process.poll() is None and time.monotonic() < deadline and not list(chunks.glob("0*.safetensors")):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    if json.loads((workplace / "ex-cut" / "manifest.json").read_text())["status"] == "complete":
        pytest.skip("the run was faster than the kill")
    refused = call(*arguments, "--out", "ex-cut")
    assert refused.code == 2 and "--resume" in refused.err
    resumed = call(*arguments, "--out", "ex-cut", "--resume")
    assert resumed.code == 0, resumed.err
    whole = call(*arguments, "--out", "ex-whole")
    assert whole.code == 0, whole.err
    for name in ("latents.parquet", "examples.parquet"):
        assert (workplace / "ex-cut" / name).read_bytes() == (workplace / "ex-whole" / name).read_bytes()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("examples", "base", "tuned", "--dictionary", "sae", "--corpus", "nothing.jsonl"), "does not exist"),
        (("examples", "nowhere", "tuned", "--dictionary", "sae", *CORPORA), "nowhere"),
        (("examples", "base", "tuned", "--dictionary", "nowhere/", *CORPORA), "nowhere"),
        (("examples", "base", "tuned", *CORPORA, "--dictionary", "ex-narrow"), "width"),
        (("examples", "base", "tuned", *CORPORA, "--dictionary", "ex-nan"), "NaN"),
        (("examples", "base", *CORPORA, "--dictionary", "ex-pair"), "reads a base and a tuned model"),
        ((*RUN, "--tops", "0"), "tops"),
        ((*RUN, "--site", "resid_post.99"), "layers run from 0"),
        ((*RUN[:5], "--corpus", "ex-broken.jsonl"), "ex-broken.jsonl"),
    ],
)
def test_bad_input_is_one_paragraph(call, workplace, arguments, message):
    if not (workplace / "ex-nan").exists():
        Dictionary(16, 8, k=2, metadata={"site": "resid_post.0"}).save_pretrained(workplace / "ex-narrow")
        Dictionary(
            32, 8, activation="relu", models=2, view="pair", metadata={"site": "resid_post.0"}
        ).save_pretrained(workplace / "ex-pair")
        made = Dictionary(32, 8, k=2, metadata={"site": "resid_post.0"})
        made.W_enc.data[0, 0, 0] = float("nan")
        try:
            made.save_pretrained(workplace / "ex-nan")
        except Exception:
            import shutil

            shutil.copytree(workplace / "sae", workplace / "ex-nan")
            from safetensors.torch import load_file, save_file

            weights = load_file(workplace / "ex-nan" / "dictionary.safetensors")
            weights["W_enc"][0, 0, 0] = float("nan")
            save_file(weights, workplace / "ex-nan" / "dictionary.safetensors")
        (workplace / "ex-broken.jsonl").write_text('{"text": "fine"}\n{"text": \n')
    found = call(*arguments, "--out", "ex-bad")
    assert found.code == 2, found.out + found.err
    assert message.lower() in found.err.lower()
    assert "Traceback" not in found.err and len(found.err.strip().splitlines()) <= 3
    assert not (workplace / "ex-bad" / "examples.json").exists()


def test_bad_input_by_a_process_of_its_own(command):
    found = command(*RUN[:5], "--corpus", "nothing.jsonl", "--out", "ex-bad")
    assert found.code == 2 and "Traceback" not in found.err
    assert "nothing.jsonl does not exist" in found.err
