"""Training through the command line: both kinds of pair dictionaries, killed and continued, and what is refused."""

import json
import signal
import time
from shlex import split

import pytest
import torch

from palimpsest.dictionaries import load_dictionary

PAIR = split("--base base --tuned tuned --corpus general.jsonl math.jsonl --site resid_post.0")
SIZES = split("--latents 48 --k 4 --batch-size 256 --block-length 32 --lr 0.004")


@pytest.mark.parametrize("kind", ["crosscoder", "diff-sae"])
def test_pair_dictionaries_are_trained_and_described(call, workplace, kind):
    options = split("--activation batch_topk --tokens 4k --eval-corpus code.jsonl --eval-tokens 200 --json")
    out = f"made-{kind}"
    done = call("train", kind, *PAIR, *SIZES, *options, "--out", out)
    assert done.code == 0, done.err
    said = json.loads(done.out)
    assert (said["view"], said["models"]) == (("pair", 2) if kind == "crosscoder" else ("diff", 1))
    assert said["metadata"]["base"] == "base" and said["metadata"]["tuned"] == "tuned"
    assert said["metadata"]["evaluation"]["corpus"] == ["code.jsonl"]
    shown = call("info", out)
    assert shown.code == 0 and said["view"] in shown.out
    made = load_dictionary(workplace / out)
    assert made.n_latents == 48 and not made.requires_grad_(False).training


def test_variants_get_a_folder_each(call, workplace):
    done = call("train", "crosscoder", *PAIR, *SIZES, *split("--tokens 2k --variant k=2 k=8 --out sweep"))
    assert done.code == 0, done.err
    assert done.out.count("48 latents") == 2 and "sweep/k2" in done.out
    assert [load_dictionary(workplace / "sweep" / name).k for name in ("k2", "k8")] == [2, 8]


def test_a_killed_run_goes_on_and_ends_as_if_nothing_had_happened(start, call, workplace):
    """kill -9, which no handler sees."""
    long = split("--tokens 40k --checkpoint-every 10 --log-every 1 --buffer 1k --activation batch_topk")
    done = call("train", "crosscoder", *PAIR, *SIZES, *long, "--out", "whole")
    assert done.code == 0, done.err
    process = start("train", "crosscoder", *PAIR, *SIZES, *long, "--out", "killed")
    log = workplace / "killed" / "training.jsonl"
    deadline = time.monotonic() + 100
    while time.monotonic() < deadline and process.poll() is None:
        if log.exists() and log.read_text().count("\n") >= 25:
            break
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL, "it ended before it could be killed"
    assert call("info", "killed").code == 2 or "running" in call("info", "killed").out
    refused = call("train", "crosscoder", *PAIR, *SIZES, *long, "--out", "killed")
    assert refused.code == 2 and "--resume" in refused.err
    other = call(
        "train", "crosscoder", *PAIR, *SIZES, *long, "--k-anneal", "0.5", "--out", "killed", "--resume"
    )
    assert other.code == 2 and "k_anneal" in other.err
    resumed = call("train", "crosscoder", *PAIR, *SIZES, *long, "--out", "killed", "--resume")
    assert resumed.code == 0, resumed.err
    whole, killed = (load_dictionary(workplace / name) for name in ("whole", "killed"))
    for name, tensor in whole.state_dict().items():
        assert torch.equal(killed.state_dict()[name], tensor)
    steps = [json.loads(line)["step"] for line in log.read_text().splitlines()]
    assert steps == list(range(1, len(steps) + 1)) and len(steps) == 40_000 // 256


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ("train crosscoder --base base --corpus math.jsonl --site resid_post.0", "--base and --tuned"),
        ("train crosscoder --base base --tuned tuned --site resid_post.0", "Found: neither"),
        (f"train diff-sae {' '.join(PAIR)} --shared 4", "Only a crosscoder"),
        (f"train crosscoder {' '.join(PAIR)} --k 5000", "1 to 4096"),
        (f"train crosscoder {' '.join(PAIR)} --activation gated", "gated"),
        (f"train crosscoder {' '.join(PAIR)} --activation relu --prefixes 8 4096", "need topk"),
        (f"train crosscoder {' '.join(PAIR)} --sparsity tanh", "no sparsity penalty"),
        (f"train crosscoder {' '.join(PAIR)} --variant k=x", "cannot be read"),
        (f"train crosscoder {' '.join(PAIR[:-1])} resid_post.9", "layers run from 0 to 1"),
        (f"train crosscoder {' '.join(PAIR)} --latnts 9", "--latents"),
        ("train sae --model base --corpus math.jsonl --site resid_post.0 --side third", "third"),
        ("train crosscoder --store missing --site resid_post.0", "missing"),
    ],
)
def test_what_is_refused(call, tmp_path, arguments, problem):
    done = call(*split(arguments), "--out", tmp_path / "refused")
    assert done.code == 2 and problem in done.err and done.err.count("\n") == 1 and done.out == ""
    assert not (tmp_path / "refused").exists()


def test_a_tracker_that_is_not_installed_is_named(call, tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "trackio", None)
    done = call(
        "train", "crosscoder", *PAIR, *SIZES, "--tokens", "1k", "--track", "trackio", "--out", tmp_path / "t"
    )
    assert done.code == 2 and "pip install trackio" in done.err
