"""What verbs print: a summary for people, or one JSON value and nothing else; nothing that steers a terminal."""

import json
from shlex import split

import pytest

CHEAP = {
    "harvest": "harvest base --tuned tuned --corpus general.jsonl --site resid_post.0 --out op-store-{n}",
    "train": "train sae --model base --corpus general.jsonl math.jsonl --site resid_post.0 --latents 48 --k 4 "
    "--batch-size 256 --block-length 32 --tokens 1k --eval-corpus code.jsonl --eval-tokens 100 --out op-sae-{n}",
    "evaluate": "evaluate sae --model base --corpus general.jsonl --resamples 100 --out op-evaluation-{n}",
    "convert": "convert sae --to sparsify --out op-converted-{n}",
    "info": "info sae",
    "battery list": "battery list .",
    "completion": "completion fish",
}
TABLES = ("harvest", "train", "evaluate")


@pytest.mark.parametrize("verb", CHEAP)
def test_json_stands_alone_on_standard_output(verb, call):
    told = call(*split(CHEAP[verb].format(n="told")))
    assert told.code == 0 and told.out.strip(), told.err
    with pytest.raises(ValueError):
        json.loads(told.out)
    assert verb not in TABLES or ("━" in told.out and "ritten to" in told.out)
    done = call(*split(CHEAP[verb].format(n="json")), "--json")
    assert done.code == 0 and done.out.endswith("\n") and done.out.count("\n") == 1, done.err
    json.loads(done.out)
    if verb not in TABLES:
        quiet = call(*split(CHEAP[verb].format(n="quiet")), "--quiet")
        assert quiet == (0, "", "")


def test_names_cannot_steer_the_terminal(call, audit_args):
    name = "\x1b]0;owned\x07\u202emath"
    done = call(
        *audit_args, "--general", "general.jsonl", "--task", f"{name}=math.jsonl", "--out", "op-hostile"
    )
    assert done.code == 0 and "math" in done.out, done.err
    assert not {"\x1b", "\x07", "\u202e"} & set(done.out + done.err)
    again = call("report", "op-hostile", "--json")
    assert again.code == 0 and json.loads(again.out), again.err
