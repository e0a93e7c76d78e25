"""Bad input: exit code 2, one paragraph that names what is wrong, and nothing half-written."""

import json
import shutil
import subprocess
from shlex import split

import pytest

from palimpsest.artifacts import open_artifact
from palimpsest.errors import ArtifactError

GENERAL = ["--general", "general.jsonl"]
TASK = ["--task", "math=math.jsonl"]


@pytest.fixture
def out(tmp_path):
    """Return where a refused run must leave nothing."""
    return tmp_path / "refused"


@pytest.fixture(scope="module")
def broken(workplace, tiny_llama):
    """Fill the folder with everything that must be refused."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

    from palimpsest.dictionaries import Dictionary

    good = (workplace / "math.jsonl").read_text().splitlines()
    texts = {
        "empty": [],
        "blank": ["", ""],
        "untold": ['{"text": ""}'] * 14,
        "fieldless": ['{"body": "x"}'] * 14,
        "badline": [*good[:6], '{"text": "cut', *good[7:]],
        "few": good[:4],
    }
    for name, lines in texts.items():
        (workplace / f"{name}.jsonl").write_text("".join(f"{line}\n" for line in lines))
    shutil.copytree(tiny_llama(hidden_size=64), workplace / "wide")
    for name in ("nan", "cut", "retoken"):
        shutil.copytree(workplace / "tuned", workplace / name)
    _poison(workplace / "nan" / "model.safetensors")
    cut = workplace / "cut" / "model.safetensors"
    cut.write_bytes(cut.read_bytes()[:-1000])
    path = workplace / "retoken" / "tokenizer.json"
    content = json.loads(path.read_text())
    vocab = content["model"]["vocab"]
    one, other = (token for token, index in vocab.items() if index in (70, 71))
    vocab[one], vocab[other] = vocab[other], vocab[one]
    path.write_text(json.dumps(content))
    config = GPT2Config(
        vocab_size=320, n_positions=32, n_embd=32, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2
    )
    GPT2LMHeadModel(config).save_pretrained(workplace / "short")
    for tokens in (workplace / "base").glob("tokenizer*"):
        shutil.copy(tokens, workplace / "short")
    for base in ("base", "wide"):
        model = AutoModelForCausalLM.from_pretrained(workplace / base)
        adapter = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))
        adapter.save_pretrained(workplace / f"adapter-{base}")
    torch.manual_seed(0)
    site = {"site": "resid_post.0"}
    Dictionary(64, 64, k=8, metadata=site).save_pretrained(workplace / "sae-wide")
    Dictionary(32, 64, k=8, models=2, view="pair", metadata=site).save_pretrained(workplace / "crosscoder")
    Dictionary(32, 64, k=8).save_pretrained(workplace / "sae-nowhere")
    return workplace


def _poison(path):
    from safetensors.torch import load_file, save_file

    weights = load_file(path)
    weights["model.layers.1.mlp.down_proj.weight"][0, 0] = float("nan")
    save_file(weights, path, metadata={"format": "pt"})


def check_refused(result, *names):
    assert result.code == 2, result
    assert result.out == "", "standard output is for results"
    assert result.err.startswith("palimpsest ") and result.err.count("\n") == 1, result.err
    assert "Traceback" not in result.err
    for name in names:
        assert name in result.err, f"{name!r} is not in: {result.err}"


CORPORA = {
    "missing file": ([*GENERAL, "--task", "math=nowhere.jsonl"], ["nowhere.jsonl", "does not exist"]),
    "missing file by its full path": (["--general", "/no/where.jsonl", *TASK], ["/no/where.jsonl"]),
    "empty file": (["--general", "empty.jsonl", *TASK], ["empty.jsonl is empty"]),
    "blank lines only": (["--general", "blank.jsonl", *TASK], ["general", "no rows with text"]),
    "rows with an empty text": ([*GENERAL, "--task", "math=untold.jsonl"], ["math", "14 empty"]),
    "rows without text": (
        [*GENERAL, "--task", "math=fieldless.jsonl"],
        ["fieldless.jsonl:1", "'text'", "body"],
    ),
    "a bad line": ([*GENERAL, "--task", "math=badline.jsonl"], ["badline.jsonl:7", "--skip-bad-rows"]),
    "too few documents": ([*GENERAL, "--task", "math=few.jsonl"], ["corpus math", "at least 10", "4"]),
    "two tasks of one name": ([*GENERAL, *TASK, "math=code.jsonl"], ["different names", "math, math"]),
    "a task called general": ([*GENERAL, "--task", "general=math.jsonl"], ["'general'"]),
    "a task without a file": ([*GENERAL, "--task", "math="], ["'math='", "NAME=FILE"]),
    "a task without a name": ([*GENERAL, "--task", "=math.jsonl"], ["'=math.jsonl'", "NAME=FILE"]),
    "roles that do not exist": ([*GENERAL, *TASK, "--roles", "pope"], ["pope", "assistant"]),
}


@pytest.mark.parametrize("case", CORPORA)
def test_corpora(case, broken, call, audit_args, out):
    flags, names = CORPORA[case]
    check_refused(call(*audit_args, *flags, "--out", out), *names)
    assert not out.exists()


def test_a_bad_line_can_be_skipped_and_is_counted(broken, call, audit_args):
    flags = [*GENERAL, "--task", "math=badline.jsonl", "--skip-bad-rows"]
    done = call(*audit_args, *flags, "--json", "--out", "skipped")
    assert done.code == 0, done.err
    general, math = json.loads(done.out)["datasets"]
    assert (general["bad_rows"], math["bad_rows"], math["documents"]) == (0, 1, 13)


PAIRS = {
    "tokenizers that disagree": (["base", "retoken", "sae"], ["base and retoken disagree at id 70"]),
    "another width": (["base", "wide", "sae"], ["wide is no fine-tune of base", "width", "32", "64"]),
    "an adapter of another base": (["base", "adapter-wide", "sae"], ["adapter-wide", "another base", "wide"]),
    "an adapter of a base with its name": (
        ["tuned", "adapter-base", "sae"],
        ["adapter-base", "another base"],
    ),
    "NaN in the fine-tune": (["base", "nan", "sae"], ["nan gives", "not finite"]),
    "NaN in the base": (["nan", "tuned", "sae"], ["nan gives", "not finite"]),
    "weights cut short": (["base", "cut", "sae"], ["Cannot load the model cut"]),
    "no such base": (["nowhere", "tuned", "sae"], ["nowhere"]),
    "no such dictionary": (["base", "tuned", "nowhere"], ["There is no folder nowhere"]),
    "a model as the dictionary": (["base", "tuned", "base"], ["base holds no dictionary", "SAELens"]),
    "a dictionary of another width": (
        ["base", "tuned", "sae-wide"],
        ["sae-wide does not fit base", "32", "64"],
    ),
    "a dictionary of two models": (["base", "tuned", "crosscoder"], ["crosscoder reads two models"]),
    "a dictionary that names no site": (["base", "tuned", "sae-nowhere"], ["sae-nowhere", "--site"]),
}


@pytest.mark.parametrize("case", PAIRS)
def test_models_and_dictionaries(case, broken, call, out):
    (base, tuned, dictionary), names = PAIRS[case]
    done = call("audit", base, tuned, "--dictionary", dictionary, *GENERAL, *TASK, "--out", out)
    check_refused(done, *names)
    assert not out.exists()


def test_text_beyond_the_context_is_cut_and_said(broken, call):
    arguments = ["audit", "short", "short", "--dictionary", "sae", "--resamples", "100", *GENERAL, *TASK]
    done = call(*arguments, "--json", "--out", "short-run")
    assert done.code == 0 and "context of 32 tokens" in done.err
    assert all(data["tokens"] <= 14 * 32 for data in json.loads(done.out)["datasets"])
    line = "harvest short --corpus math.jsonl --site resid_post.0 --out short-store"
    check_refused(call(*split(line)), "the context of short", "at most 32", "--max-length 32")


FLAGS = {
    "another site": (["--site", "resid_post.1"], ["trained on another site", "resid_post.0", "--force-site"]),
    "a layer that is not there": (["--site", "resid_post.9"], ["no site 'resid_post.9'", "0 to 1"]),
    "no site at all": (["--site", "bananas"], ["no site 'bananas'"]),
    "a depth beyond the model": (["--site", "resid_post.150%"], ["0% to 100%"]),
    "k above the number of latents": (["--k", "100", "--k-max", "128"], ["number of latents", "64", "100"]),
    "k above k_max": (["--k", "9", "--k-max", "8"], ["k does not fit k_max", "--k-max"]),
    "k of zero": (["--k", "0"], ["'0' is no count for --k"]),
    "a k that is no number": (["--k", "five"], ["'five'", "--k"]),
    "a k with decimals": (["--k", "5.7"], ["'5.7'", "--k"]),
    "confidence": (["--confidence", "1.5"], ["confidence", "1.5"]),
    "resamples": (["--resamples", "5"], ["resamples", "at least 100", "5"]),
    "a count": (["--max-documents", "lots"], ["'lots' is no count for --max-documents"]),
    "latents below zero": (["--top-latents", "-3"], ["'-3' is no count for --top-latents"]),
    "documents of no length": (["--max-length", "1"], ["max_length", "at least 2"]),
    "KL without a forward pass": (["--kl", "--no-loss"], ["--kl", "--no-loss"]),
    "a seed below zero": (["--seed", "-1"], ["seed", "-1"]),
    "a dtype": (["--dtype", "int8"], ["int8", "bfloat16"]),
    "a device": (["--device", "bananas"], ["device bananas"]),
    "a device that is not there": (["--device", "cuda:77"], ["device cuda:77"]),
    "an argument of from_pretrained": (
        ["--load-kwargs.bananas", "3"],
        ["Cannot load the model base", "bananas"],
    ),
    "arguments that are no JSON": (["--load-kwargs", "[1]"], ["--load-kwargs", "JSON object"]),
    "resume and overwrite": (["--resume", "--overwrite"], ["--resume and --overwrite"]),
    "a config file of unknown format": (
        ["--config", "options.ini"],
        ["options.ini", ".toml, .yaml or .json"],
    ),
    "no config file": (["--config", "nowhere.toml"], ["nowhere.toml"]),
    "a config file without its name": (["--config"], ["--config needs a file"]),
    "a config file that is cut short": (["--config", "cut.yaml"], ["Cannot parse", "cut.yaml", "line 2"]),
    "a config file of a list": (["--config", "list.json"], ["list.json holds no options"]),
    "an unknown key": (["--config", "unknown.toml"], ["bananas", "unknown.toml"]),
    "a value of the wrong type": (["--config", "typed.json"], ["[kl]", "typed.json", "perhaps"]),
}


@pytest.mark.parametrize("case", FLAGS)
def test_flags_and_config_files(case, broken, call, out):
    files = {
        "options.ini": "k = 5",
        "cut.yaml": "task: [1\nb: }",
        "list.json": "[1]",
        "unknown.toml": "bananas = 3",
        "typed.json": '{"kl": "perhaps"}',
    }
    for name, text in files.items():
        (broken / name).write_text(text)
    flags, names = FLAGS[case]
    start = ["audit", "base", "tuned", "--dictionary", "sae", *GENERAL, *TASK, "--out", out]
    check_refused(call(*start, *flags), *names)
    assert not out.exists()


OTHER = {
    "train: k above the latents": ("train sae --latents 64 --k 100", ["number of latents", "64", "100"]),
    "train: no count": ("train sae --tokens 2x", ["'2x' is no count for --tokens"]),
    "train: an empty corpus": ("train sae --corpus empty.jsonl", ["empty.jsonl is empty"]),
    "train: blocks beyond the context": ("train sae --block-length 1k", ["context", "512", "1000"]),
    "train: model and store": ("train sae --store somewhere", ["--store", "both"]),
    "train: no learning rate": ("train sae --lr nan", ["--lr"]),
    "train: no such site": ("train sae --site resid_post.5", ["no site 'resid_post.5'"]),
    "harvest: no such site": ("harvest base --site bananas", ["no site 'bananas'"]),
    "harvest: no such file": ("harvest base --corpus nowhere.jsonl", ["nowhere.jsonl"]),
}


@pytest.mark.parametrize("case", OTHER)
def test_other_verbs(case, broken, call, out):
    line, names = OTHER[case]
    arguments = split(line)
    given = {"--corpus": "math.jsonl", "--site": "resid_post.0", "--out": out}
    if arguments[0] == "train":
        given["--model"] = "base"
    arguments += [part for flag, value in given.items() if flag not in arguments for part in (flag, value)]
    check_refused(call(*arguments), *names)
    assert not out.exists()


def test_a_folder_of_something_else_is_left_alone(broken, call, audit_args):
    before = sorted(path.name for path in (broken / "base").iterdir())
    for flags in ([], ["--overwrite"], ["--resume"]):
        check_refused(call(*audit_args, *GENERAL, *TASK, "--out", "base", *flags), "base is not empty")
    check_refused(call(*audit_args, *GENERAL, *TASK, "--out", "math.jsonl"), "math.jsonl is a file")
    assert sorted(path.name for path in (broken / "base").iterdir()) == before


@pytest.fixture
def finished(broken, call, audit_args):
    """Return a finished run that a test may damage."""
    shutil.rmtree(broken / "victim", ignore_errors=True)
    assert call(*audit_args, *GENERAL, *TASK, "--quiet", "--out", "victim").code == 0
    return broken / "victim"


@pytest.mark.parametrize("name", ["audit.json", "curve.parquet", "latents.parquet"])
def test_an_edited_run(name, finished, call):
    path = finished / name
    path.write_bytes(path.read_bytes() + b"\n")
    page = (finished / "report.html").read_bytes()
    for verb in ("info", "report"):
        check_refused(call(verb, "victim"), f"victim/{name} was changed")
    assert (finished / "report.html").read_bytes() == page


def test_a_run_with_a_file_missing_or_a_damaged_manifest(finished, call):
    (finished / "curve.parquet").unlink()
    check_refused(call("report", "victim"), "curve.parquet is missing")
    (finished / "manifest.json").write_text('{"schema": 1, "stage"')
    check_refused(call("info", "victim"), "manifest.json")


def test_an_edited_dictionary(broken, call, out):
    shutil.copytree(broken / "sae", broken / "sae-edited")
    path = broken / "sae-edited" / "dictionary.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    arguments = ["audit", "base", "tuned", "--dictionary", "sae-edited", *GENERAL, *TASK, "--out", out]
    check_refused(call(*arguments), "dictionary.safetensors was changed")
    assert not out.exists()


def test_reading_what_is_no_run(broken, call):
    check_refused(call("report", "base"), "base")
    check_refused(call("report", "nowhere"), "There is no folder nowhere")
    check_refused(call("info", "base"), "base holds no dictionary in a known format")
    check_refused(call("info", "math.jsonl"), "math.jsonl holds no dictionary in a known format")


def test_an_unfinished_dictionary_is_refused(broken, call, out):
    shutil.copytree(broken / "sae", broken / "sae-half")
    manifest = json.loads((broken / "sae-half" / "manifest.json").read_text())
    (broken / "sae-half" / "manifest.json").write_text(json.dumps(manifest | {"status": "running"}))
    arguments = ["audit", "base", "tuned", "--dictionary", "sae-half", *GENERAL, *TASK, "--out", out]
    check_refused(call(*arguments), "sae-half is not finished")
    assert not out.exists()


@pytest.fixture
def small_disk(tmp_path):
    """Mount a file system of 100 KB, or skip."""
    where = tmp_path / "disk"
    where.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=100k", "tmpfs", where]
    if not shutil.which("mount") or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("only root can mount the small disk that this test fills")
    yield where
    subprocess.run(["umount", where], check=True)


@pytest.mark.parametrize("flags", [[], ["--one-at-a-time"]], ids=["both models", "one at a time"])
def test_a_full_disk(flags, small_disk, call, audit_args):
    out = small_disk / "run"
    arguments = [*audit_args, *flags, *GENERAL, *TASK, "code=code.jsonl", "--out", out]
    (small_disk / "ballast").write_bytes(b"x" * 60_000)
    check_refused(call(*arguments), "No space left on the disk", str(out))
    with pytest.raises(ArtifactError, match="not finished"):
        open_artifact(out)
    assert not [path for path in out.rglob("*") if path.name.endswith((".unfinished", ".tmp"))]
    subprocess.run(["mount", "-o", "remount,size=10m", small_disk], check=True)
    assert call(*arguments, "--resume").code == 0
    assert open_artifact(out, stage="audit").read_json("audit.json")["tasks"][1]["name"] == "code"


def test_a_disk_that_fills_while_the_results_are_written(broken, call, audit_args, monkeypatch):
    import errno

    from palimpsest.artifacts import disk

    real = disk.flush

    def flush(path):
        if "latents.parquet" in path.name:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        real(path)

    monkeypatch.setattr(disk, "flush", flush)
    arguments = [*audit_args, *GENERAL, *TASK, "--out", "filled"]
    check_refused(call(*arguments), "No space left on the disk", "latents.parquet", "--resume")
    assert not list((broken / "filled").glob("*latents*"))
    check_refused(call("report", "filled"), "filled")
    monkeypatch.setattr(disk, "flush", real)
    assert call(*arguments, "--resume").code == 0 and call("info", "filled").code == 0
