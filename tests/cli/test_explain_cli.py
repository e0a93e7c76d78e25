"""`palimpsest explain` from the shell: what it prints, what it writes, what it refuses."""

from __future__ import annotations

import json
import shutil

import pytest

from palimpsest.artifacts import open_artifact
from palimpsest.tune.explain import Explanation

TEXT = (
    "--corpus",
    "math=math.jsonl",
    "code.jsonl",
    "--general",
    "general.jsonl",
    "--offline",
    "--device",
    "cpu",
)
QUICK = (
    "--eval-rows",
    "12",
    "--points",
    "2",
    "--random-orders",
    "1",
    "--resamples",
    "50",
    "--permutations",
    "20",
)
LABEL = "a river\x1b[2J | <b>mill</b>"


@pytest.fixture(scope="module")
def adapters(workplace, tmp_path_factory):
    """Add adapters on `base`: one that moves latents, another of other values, and one through another dictionary."""
    import torch
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM

    from palimpsest.dictionaries import Dictionary
    from palimpsest.tune.adapter import LatentConfig, latent_layers

    torch.manual_seed(4)
    Dictionary(32, 64, k=8, metadata={"site": "resid_post.0"}).save_pretrained(workplace / "ex-sae")
    for name, sae, seed in (("ex-a", "sae", 0), ("ex-b", "sae", 1), ("ex-c", "ex-sae", 0)):
        base = AutoModelForCausalLM.from_pretrained(workplace / "base", dtype=torch.float32)
        model = get_peft_model(base, LatentConfig(target_hooks=[(str(workplace / sae), None)]))
        torch.manual_seed(seed)
        with torch.no_grad():
            latent_layers(model)[0].component().weight[:40] = torch.randn(40)
        model.save_pretrained(workplace / name)
    labels = workplace / "ex-labels.json"
    labels.write_text(json.dumps({"resid_post.0": {str(latent): LABEL for latent in range(64)}}))
    return workplace


@pytest.fixture
def out(tmp_path):
    return tmp_path / "ex-run"


def test_as_a_process(adapters, command, out):
    shown = command("explain", "ex-a", *TEXT, *QUICK, "--labels", "ex-labels.json", "--out", out)
    assert (shown.code, shown.err) == (0, ""), shown.err
    for words in (
        "scale: the 12 latents with the largest effect",
        "fires on math",
        "fires on general",
        "a river",
    ):
        assert words in shown.out, shown.out
    assert f"Written to {out}" in shown.out and "documents kept for reporting" in shown.out
    assert "\x1b" not in shown.out and "[2J" in shown.out, "labels are shown, not obeyed"
    assert {"explain.json", "latents.parquet"} <= set(open_artifact(out, stage="explain").files)


def test_json_is_the_folders_content(adapters, call, out):
    shown = call("explain", "ex-a", *TEXT, *QUICK, "--json", "--out", out)
    data = json.loads(shown.out)
    stored = open_artifact(out).read_json("explain.json")
    assert shown.code == 0 and Explanation.from_dict(data) == Explanation.from_dict(stored)
    assert [one["name"] for one in data["corpora"]] == ["math", "code", "general"]
    keys = {
        "schema",
        "adapter",
        "component",
        "sites",
        "corpora",
        "rankings",
        "concentration",
        "curves",
        "pruned",
    }
    assert keys | {"specificity", "controls", "summary"} <= set(data) and data["path"] == str(out)
    assert [one["by"] for one in data["rankings"]] == ["effect", "value", "absolute", "weighted"]
    again = call("explain", "ex-a", *TEXT, *QUICK, "--resume", "--json", "--out", out)
    assert json.loads(again.out) == data
    info = call("info", out)
    assert "explain (complete" in info.out and "concentration" in info.out and "input adapter" in info.out
    refused = call("explain", "ex-a", *TEXT, *QUICK, "--out", out)
    assert refused.code == 2 and "--overwrite" in refused.err


def test_controls_and_compare(adapters, call, out, tmp_path):
    same = shutil.copytree(adapters / "ex-a", tmp_path / "same")
    shown = call("explain", "ex-a", *TEXT, *QUICK, "--twin", same, "--other", "ex-b", "--json", "--out", out)
    controls = json.loads(shown.out)["controls"]
    assert controls["twin"]["cosine"] == pytest.approx(1) and controls["other"]["cosine"] < 0.9
    both = out.parent / "ex-both"
    shown = call("explain", "compare", "ex-a", "ex-b", *TEXT, "--labels", "ex-labels.json", "--out", both)
    assert shown.code == 0 and "Moved in A only" in shown.out and "a river" in shown.out, shown.err
    page = (both / "compare.md").read_text()
    assert "<b>" not in page and r"\| \<b\>" in page and "\x1b" not in page
    assert set(open_artifact(both, stage="explain-compare").files) == {"compare.json", "compare.md"}
    assert "only_a" in call("info", both).out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("ex-a",), "--corpus"),
        (("base", *TEXT), "holds no adapter"),
        (("nowhere/at/all", *TEXT), "nowhere"),
        (("ex-a", "--corpus", "missing.jsonl"), "does not exist"),
        (("ex-a", "--corpus", "a=math.jsonl", "a=code.jsonl"), "different names"),
        (("ex-a", "--corpus", "general=math.jsonl"), "different names"),
        (("ex-a", *TEXT, "--model", "tuned"), "another base"),
        (("ex-a", *TEXT, "--twin", "ex-c", *QUICK), "same dictionaries"),
        (("ex-a", *TEXT, "--keep", "2"), "share of the effect"),
        (("ex-a", *TEXT, "--pairs", "math.jsonl", *QUICK), "prompt"),
        (("ex-a", *TEXT, "--beta", "0.5"), "--pairs"),
        (("ex-a", *TEXT, "--labels", "math.jsonl"), "holds no labels"),
        (("compare", "ex-a", "ex-a", *TEXT), "compared with itself"),
        (("compare", "ex-a", "ex-c", *TEXT), "same dictionaries"),
        (("compare", "ex-a", "ex-b", *TEXT, "--strong", "0.95"), "--strong"),
    ],
)
def test_bad_input_is_one_paragraph(adapters, call, out, arguments, words):
    shown = call("explain", *arguments, "--out", out)
    assert (shown.code, shown.out, shown.err.count("\n")) == (2, "", 1), shown.err
    assert words in shown.err, shown.err


def test_other_adapters_are_sent_to_the_audit(adapters, call, out, tmp_path):
    lora = tmp_path / "lora"
    shutil.copytree(adapters / "ex-a", lora)
    content = json.loads((lora / "adapter_config.json").read_text()) | {"peft_type": "LORA"}
    (lora / "adapter_config.json").write_text(json.dumps(content))
    shown = call("explain", lora, *TEXT, "--out", out)
    assert shown.code == 2 and "does not edit latents" in shown.err and "palimpsest audit" in shown.err


def test_weights_that_do_not_fit_the_configuration(adapters, call, out, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(adapters / "ex-a", broken)
    content = json.loads((broken / "adapter_config.json").read_text()) | {"latents": [1, 2, 3]}
    (broken / "adapter_config.json").write_text(json.dumps(content))
    for arguments in ((broken, *TEXT), ("ex-a", *TEXT, *QUICK, "--twin", broken)):
        shown = call("explain", *arguments, "--out", out)
        assert shown.code == 2 and "does not fit" in shown.err, shown.err
        shutil.rmtree(out, ignore_errors=True)


def test_a_file_of_options(adapters, call, out, tmp_path):
    options = tmp_path / "explain.toml"
    options.write_text(
        'corpus = ["math.jsonl"]\neval_rows = 12\npoints = 2\nrandom_orders = 1\noffline = true\n'
    )
    shown = call("explain", "ex-a", "--config", options, "--json", "--out", out)
    assert shown.code == 0 and json.loads(shown.out)["specificity"] is None, shown.err


def test_info_tells_of_an_adapter_that_no_run_wrote(adapters, call, tmp_path):
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(adapters / "ex-a" / name, bare / name)
    shown = call("info", bare, "--json")
    told = json.loads(shown.out)
    assert shown.code == 0 and told["format"] == "PEFT adapter" and told["component"] == "scale", shown.err


@pytest.mark.parametrize("flag", ["--twin", "--other", "--shuffled"])
def test_an_adapter_is_no_control_of_itself(adapters, call, out, flag):
    shown = call("explain", "ex-a", *TEXT, *QUICK, flag, "ex-a", "--out", out)
    assert shown.code == 2 and "no control of itself" in shown.err, shown.err
