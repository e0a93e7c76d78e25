"""What must not be lost, and what must be said before anything is trained."""

import json
from shlex import split

import pytest

from palimpsest.dictionaries import load_dictionary

SOURCE = split("--model base --corpus general.jsonl math.jsonl --site resid_post.0")
PAIR = split("--base base --tuned tuned --corpus general.jsonl math.jsonl --site resid_post.0")
SIZES = split("--latents 48 --k 4 --batch-size 256 --block-length 32 --tokens 2k")


def test_overwrite_spares_what_the_run_reads(call, workplace):
    store = split("harvest base --corpus math.jsonl --site resid_post.0 --out precious")
    assert call(*store).code == 0
    done = call(
        "train",
        "sae",
        *split("--store precious --site resid_post.0"),
        *SIZES,
        *split("--out precious --overwrite"),
    )
    assert done.code == 2 and "would delete the store" in done.err
    assert call("info", "precious").code == 0
    assert call("train", "sae", *SOURCE, *SIZES, "--out", "spared").code == 0
    done = call(*split("evaluate spared --model base --corpus math.jsonl --out spared --overwrite"))
    assert done.code == 2 and "would delete the dictionary" in done.err
    assert load_dictionary(workplace / "spared").n_latents == 48


def test_bad_held_out_text_is_said_before_training(call, workplace):
    done = call("train", "sae", *SOURCE, *SIZES, *split("--eval-corpus nothere.jsonl --out early"))
    assert done.code == 2 and "nothere.jsonl" in done.err and not (workplace / "early").exists()
    done = call(
        "train",
        "sae",
        *SOURCE,
        *SIZES,
        *split("--eval-corpus math.jsonl --max-length 4096 --eval-tokens 100 --out long"),
    )
    assert done.code == 0, done.err
    inputs = json.loads((workplace / "long" / "manifest.json").read_text())["inputs"]
    assert set(inputs) == {"model", "corpus", "eval_corpus"}


def test_a_failure_after_the_last_step_does_not_train_again(call, workplace, monkeypatch):
    from palimpsest.train import run

    options = split("--eval-corpus math.jsonl --eval-tokens 100")

    def broken(*arguments, **options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(run, "evaluate_dictionary", broken)
        assert call("train", "crosscoder", *PAIR, *SIZES, *options, "--out", "late").code == 130
    with monkeypatch.context() as patch:
        patch.setattr("palimpsest.dictionaries.training.trainer.Trainer.advance", broken)
        # Other checkpoint and report intervals change nothing of the result.
        more = split("--resume --checkpoint-every 5 --log-every 7 --out late")
        done = call("train", "crosscoder", *PAIR, *SIZES, *options, *more)
    assert done.code == 0, done.err
    whole = call("train", "crosscoder", *PAIR, *SIZES, *options, "--out", "ontime", "--json")
    said = json.loads(whole.out)["metadata"]
    assert load_dictionary(workplace / "late").metadata["metrics"] == said["metrics"]
    assert load_dictionary(workplace / "late").metadata["evaluation"] == said["evaluation"]


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ("--variant k=4 :k=3", "folder name"),
        ("--variant parts:k=3", "folder name"),
        ("--variant manifest.json:k=3", "folder name"),
        ("--variant ../x:k=3", "folder name"),
        (f"--variant {'a' * 300}:k=3", "folder name"),
        ("--variant a:k=3,k=5", "sets a value twice"),
        ("--variant lr=inf", "not finite"),
        ("--variant latents=64.5", "no count"),
        ("--variant seed=1.5", "cannot be read"),
        ("--variant shared=4", "Only a crosscoder"),
        ("--expansion 2", "said twice"),
        ("--roles assistant", "no token to measure"),
        ("--push not/a/name", "owner/name"),
        ("--seed 99999999999999999999999", "out of range"),
        ("--buffer 100000G", "not enough memory"),
    ],
)
def test_refused_before_anything_is_made(call, workplace, arguments, problem):
    done = call("train", "sae", *SOURCE, *SIZES, *split(arguments), *split("--out refused"))
    assert done.code == 2 and problem in done.err and done.err.count("\n") == 1
    if "memory" not in problem:
        kept = workplace / "refused"
        assert not kept.exists() or "roles" in arguments
    if (workplace / "refused").exists():
        import shutil

        shutil.rmtree(workplace / "refused")


def test_variants_read_every_kind_of_value(call, workplace):
    texts = split(
        "--variant one:latents=16,k=8 two:error=unsquared,latents=1k three:activation=batch_topk,prefixes=8+48"
    )
    done = call("train", "sae", *SOURCE, *SIZES, *texts, "--out", "kinds")
    assert done.code == 0, done.err
    made = {name: load_dictionary(workplace / "kinds" / name) for name in ("one", "two", "three")}
    assert (made["one"].n_latents, made["one"].k, made["two"].n_latents) == (16, 8, 1000)
    assert made["three"].prefixes == (8, 48)
    child = json.loads((workplace / "kinds" / "one" / "manifest.json").read_text())
    assert set(child["inputs"]) == {"model", "corpus"}
    shown = call("info", "kinds")
    assert shown.code == 0 and "one" in shown.out and "fve" in shown.out


def test_a_diff_sae_is_no_dictionary_for_an_audit(call, audit_args):
    assert call("train", "diff-sae", *PAIR, *SIZES, "--out", "difference").code == 0
    done = call(
        *audit_args[:4],
        "difference",
        *audit_args[5:],
        *split("--general general.jsonl --task math=math.jsonl --out no"),
    )
    assert done.code == 2 and "reads the difference" in done.err


def test_names_with_control_codes_are_shown_not_obeyed(call, workplace):
    from palimpsest.dictionaries import Dictionary

    evil = "\x1b]0;x\x07\n  input base: trusted"
    Dictionary(32, 64, k=8, metadata={"site": "resid_post.0", "model": evil}).save_pretrained(
        workplace / "evil"
    )
    shown = call("info", "evil")
    assert shown.code == 0 and "\x1b" not in shown.out and "\n  input base: trusted" not in shown.out


def test_a_reader_that_has_seen_enough_is_no_error(start, workplace):
    process = start("info", "sae")
    process.stdout.close()
    assert process.wait(timeout=60) == 0
    assert "Traceback" not in process.stderr.read()
    process.stderr.close()
