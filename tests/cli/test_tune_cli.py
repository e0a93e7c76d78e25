"""`palimpsest tune` from the outside: the folder it leaves, what it prints, how it goes on, what it refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from zlib import crc32

import pytest

from palimpsest.artifacts import open_artifact

OPTIONS = {"--device": "cpu", "--dictionary": "sae", "--batch-size": 4, "--data": "math.jsonl", "--steps": 6}


def command(out, **changes):
    """The words of a run; a flag is written with underscores, several values as a tuple."""
    flags = (
        OPTIONS | {f"--{name.replace('_', '-')}": value for name, value in changes.items()} | {"--out": out}
    )
    words = ["tune", "base"]
    for flag, value in flags.items():
        words += [flag, *(value if isinstance(value, tuple) else () if value is True else (value,))]
    return words


FILES = {
    "README.md",
    "adapter_config.json",
    "adapter_model.safetensors",
    "latents.parquet",
    "log.jsonl",
    "tune.json",
}


def pairs(path, rows=20, **changes):
    made = [
        {"prompt": f"seven apples {place} and", "chosen": " flour", "rejected": " a river runs"} | changes
        for place in range(rows)
    ]
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in made))
    return path


def test_a_run_leaves_an_adapter_with_its_figures(call, workplace):
    result = call(*command("tn-run", objective="sft", general="general.jsonl", log_every=2, json=True))
    assert result.code == 0, result.err
    made = open_artifact(workplace / "tn-run", stage="tune")
    assert set(made.files) == FILES
    said, written = json.loads(result.out), made.read_json("tune.json")
    assert {key: said[key] for key in written} == written
    assert written["rows"] == {"train": 12, "heldout": 2}
    assert written["parameters"] == 64
    assert written["sites"][0] | {"sha256": ""} == {
        "site": "resid_post.0",
        "dictionary": "sae",
        "sha256": "",
        "latents": 64,
    }
    assert 0 < written["latents_moved"] <= 64
    assert written["general"]["kl"] > 0
    value = written["objective_value"]
    assert value["difference"] == pytest.approx(value["after"] - value["before"])
    assert written["stopped"] is None
    last = [row for row in made.read_table("latents.parquet").to_pylist() if row["step"] == 6]
    assert len(last) == written["latents_moved"]
    best = max(last, key=lambda row: abs(row["value"]))
    assert said["movers"][0] == {key: best[key] for key in ("site", "latent", "value")}
    assert made.manifest["timings"]["train"] == written["seconds"]
    assert set(made.inputs) == {"model", "dictionary/0", "data", "general"}


def test_peft_loads_what_was_measured(call, workplace):
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import palimpsest.tune.adapter  # noqa: F401

    made = workplace / "tn-run"
    if not made.exists():
        pytest.skip("the run above failed")
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("base"), "tn-run")
    assert model.peft_config["default"].base_model_name_or_path == "base"
    tokenizer = AutoTokenizer.from_pretrained("base")
    rows = [json.loads(line)["text"] for line in Path("math.jsonl").read_text().splitlines()]
    loss, count = 0.0, 0
    texts = [[tokenizer.bos_token_id, *tokenizer(text, add_special_tokens=False).input_ids] for text in rows]
    texts.sort(key=lambda ids: crc32(" ".join(map(str, ids)).encode()))
    for chosen in texts[:2]:  # Two of fourteen.
        ids = torch.tensor([chosen])
        with torch.no_grad():
            logp = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
        loss -= logp.gather(1, ids[0, 1:, None]).sum().item()
        count += ids.shape[1] - 1
    written = json.loads((made / "tune.json").read_text())
    assert loss / count == pytest.approx(written["heldout_loss"]["after"], rel=1e-5)


def test_the_terminal_shows_what_changed_and_what_comes_next(call, workplace):
    pairs("tn-pairs.jsonl", rows=20)
    long = {"prompt": "mill " * 600, "chosen": " a", "rejected": " b"}
    with Path("tn-pairs.jsonl").open("a") as file:
        file.write(json.dumps(long) + "\n")
    words = command("tn-text", objective="dpo", data="tn-pairs.jsonl", steps=4, lr=0.1)
    result = call(*words)
    assert result.code == 0, result.err
    assert "dpo with scale at resid_post.0: 64 parameters, 4 steps at lr 0.1" in result.out
    assert "dpo loss, nats (no preference learned: log 2), 2 held-out rows    0.6931" in result.out
    assert "right in 100 % of pairs" in result.out
    assert "Latents moved: " in result.out
    assert "Next: palimpsest explain tn-text --corpus FILE" in result.out
    assert "1 of 21 rows are longer than 512 tokens" in " ".join(result.err.split())
    again = call(*words)
    assert again.code == 2
    assert "already holds a finished run" in again.err


def test_nothing_is_explained_of_a_vector(call, workplace):
    result = call(*command("tn-vector", component="vector", steps=2))
    assert result.code == 0, result.err
    assert "Written to tn-vector" in result.out
    assert "Next:" not in result.out


def test_an_interrupted_run_goes_on_to_the_same_folder(call, workplace, monkeypatch):
    from palimpsest.tune.movers import Movers

    options = {"data": "code.jsonl", "save_every": 2, "log_every": 1, "component": "active-bias"}
    assert call(*command("tn-whole", **options)).code == 0
    step = Movers.on_step_end

    def interrupted(self, args, state, control, **more):
        step(self, args, state, control, **more)
        if state.global_step == 5:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Movers, "on_step_end", interrupted)
        stopped = call(*command("tn-broken", **options))
    assert stopped.code == 130
    assert "--resume goes on" in stopped.err
    assert call(*command("tn-broken", **options)).code == 2
    assert call(*command("tn-broken", **options, resume=True)).code == 0
    whole, broken = (open_artifact(workplace / name) for name in ("tn-whole", "tn-broken"))
    assert whole.files["adapter_model.safetensors"] == broken.files["adapter_model.safetensors"]
    assert whole.read_table("latents.parquet").equals(broken.read_table("latents.parquet"))
    assert not list((workplace / "tn-broken").glob("**/checkpoint-*"))
    before = (workplace / "tn-broken" / "manifest.json").read_bytes()
    assert call(*command("tn-broken", **options, resume=True)).code == 0
    assert (workplace / "tn-broken" / "manifest.json").read_bytes() == before


def test_an_interruption_before_the_first_checkpoint_starts_again(call, workplace, monkeypatch):
    from palimpsest.tune.movers import Movers

    options = {"steps": 3, "save_every": 3}

    def interrupted(self, args, state, control, **more):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Movers, "on_step_end", interrupted)
        assert call(*command("tn-early", **options)).code == 130
    assert call(*command("tn-early", **options, resume=True)).code == 0


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"component": "scael"}, "scael"),
        ({"site": "resid_post.7"}, "resid_post.7"),
        ({"site": ("resid_post.0", "resid_post.1")}, "as many sites as dictionaries"),
        ({"dictionary": "tn-nowhere"}, "tn-nowhere"),
        ({"latents": "64"}, "no such latents"),
        ({"component": "lora", "l1": 0.1}, "would do nothing"),
        ({"objective": "dpo"}, "math.jsonl:1 has no prompt"),
        ({"objective": "unlearn"}, "--retain"),
        ({"objective": "grpo", "reward": "tn_no_module:f", "data": "tn-prompts.jsonl"}, "tn_no_module"),
        ({"scope": "answer"}, "needs to know what is prompt"),
        ({"component": "low-rank", "rank": 64}, "quadratic"),
        ({"steps": 0}, "positive whole number"),
        ({"hold_out": 0.9}, "at most 0.5"),
    ],
)
def test_a_mistake_is_one_paragraph(call, workplace, changes, words):
    pairs("tn-prompts.jsonl")
    result = call(*command("tn-bad", **changes))
    assert result.code == 2, result.out
    assert words in result.err
    assert result.err.strip().count("\n") == 0
    assert "Traceback" not in result.err
    if (workplace / "tn-bad").exists():
        shutil.rmtree(workplace / "tn-bad")


def test_a_dictionary_of_another_width_is_refused(call, workplace):
    from palimpsest.dictionaries import Dictionary

    Dictionary(16, 64, k=8, metadata={"site": "resid_post.0"}).save_pretrained(workplace / "tn-narrow")
    result = call(*command("tn-wide", dictionary="tn-narrow"))
    assert result.code == 2
    assert "another width" in result.err


def test_a_pair_without_a_field_is_named(call, workplace):
    path = pairs("tn-holes.jsonl", rows=4)
    with Path(path).open("a") as file:
        file.write(json.dumps({"prompt": "a", "chosen": ""}) + "\n")
    result = call(*command("tn-holes", objective="dpo", data=path))
    assert result.code == 2
    assert "tn-holes.jsonl:5 has an empty chosen" in result.err


def test_a_rate_that_moves_nothing_is_said(call, workplace):
    result = call(*command("tn-slow", steps=2, lr="1e-6"))
    assert result.code == 0
    assert "at most about lr x steps / 2 = 1e-06" in " ".join(result.err.split())
