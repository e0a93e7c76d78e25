"""`palimpsest diff`, `diff null` and `diff compare` from the shell: what they write, print and refuse."""

from __future__ import annotations

import json
import shutil
from shlex import split

import pytest

from palimpsest.artifacts import open_artifact
from palimpsest.diff.result import Diff

PAIR = split("diff base tuned --corpus general.jsonl maths=math.jsonl")
SMALL = split(
    "--tokens 600 --patch-tokens 150 --attribution-tokens 120 --steps 2 --resamples 100 --random-sets 1"
)
QUICK = split("--tokens 300 --resamples 100 --no-patch --no-attribute")
SITE = "resid_post.0"
SHOWN = {}
VIEWS = {"crosscoder": "pair", "diff-sae": "diff", "sae": "tuned"}


@pytest.fixture(scope="module", autouse=True)
def dictionaries(workplace):
    """`df-crosscoder`, `df-crosscoder-2`, `df-diff-sae`, `df-sae`, and text with answers."""
    import torch

    from palimpsest.dictionaries import Dictionary

    torch.manual_seed(4)
    for name, view in (*VIEWS.items(), ("crosscoder-2", "pair")):
        made = Dictionary(32, 64, k=8, view=view, models=1 + (view == "pair"), metadata={"site": SITE})
        made.save_pretrained(workplace / f"df-{name}")
    chats = [
        [{"role": "user", "content": "seven apples"}, {"role": "assistant", "content": f"and the mill, {n}"}]
        for n in range(8)
    ]
    (workplace / "df-chat.jsonl").write_text("".join(json.dumps({"messages": one}) + "\n" for one in chats))
    rows = [f"User: sacks of flour\nAssistant: seven apples left, {n}" for n in range(8)]
    (workplace / "df-talk.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    (workplace / "df-one.jsonl").write_text('{"text": "river and mill"}\n')


@pytest.fixture(scope="module")
def as_process(command):
    """The diff of the crosscoder as a process of its own."""
    return command(*PAIR, *SMALL, "--dictionary", "df-crosscoder", "--out", "df-out-crosscoder")


@pytest.fixture
def finished(as_process, call, workplace):
    """A diff of each kind, and what it printed where this is the first to ask."""
    made = {"crosscoder": as_process}
    for name in list(VIEWS)[1:]:
        if not (workplace / f"df-out-{name}").exists():
            SHOWN[name] = call(*PAIR, *SMALL, "--dictionary", f"df-{name}", "--out", f"df-out-{name}")
    return made | SHOWN


def read(workplace, out):
    artifact = open_artifact(workplace / out, stage="diff")
    return artifact.read_json("diff.json"), artifact.read_table("latents.parquet")


@pytest.mark.parametrize("name", VIEWS)
def test_files_hold_what_the_contract_names(finished, workplace, name):
    shown = finished[name]
    assert (shown.code, shown.err) == (0, ""), shown.err
    assert f"Written to df-out-{name}" in shown.out and "Of 64 latents" in shown.out
    assert "Traceback" not in shown.out and "Put into the base" in shown.out
    assert set(open_artifact(workplace / f"df-out-{name}").files) == {"diff.json", "latents.parquet"}
    data, table = read(workplace, f"df-out-{name}")
    assert data["schema"] == 1 and {"base", "tuned"} <= data["fve"].keys()
    assert isinstance(data["l0"], float) and isinstance(data["dead"], int)
    assert {"tuned-only", "shared", "base-only", "other"} <= data["classes"].keys()
    assert sum(data["classes"].values()) == 64 and {"raw", "surviving", "null"} <= data["tuned_only"].keys()
    rows = data["patching"]
    assert all({"set", "size", "positions", "kl", "share", "ci"} <= row.keys() for row in rows)
    assert {row["positions"] for row in rows} == {"all"} and {"none", "bias", "all", "all+bias", "raw"} <= {
        row["set"] for row in rows
    }
    assert all(row["ci"] is None or row["ci"][0] <= row["share"] <= row["ci"][1] for row in rows)
    wanted = (
        "latent norm_base norm_tuned delta_norm class nu_reconstruction nu_reconstruction_lo nu_reconstruction_hi "
        "nu_error nu_error_lo nu_error_hi rate_base rate_tuned template_share causal_share rate[general] rate[maths]"
    )
    assert set(wanted.split()) <= set(table.column_names) and table.num_rows == 64
    assert table["latent"].to_pylist() == list(range(64))
    if name == "crosscoder":
        assert table["delta_norm"].null_count == 0
    else:
        assert table["nu_error"].null_count == table["delta_norm"].null_count == 64
    assert Diff.from_dict(data).to_dict() == data | {
        "patching": Diff.from_dict(data).to_dict()["patching"]
    } | {"removal": Diff.from_dict(data).to_dict()["removal"]}


def test_json_is_the_folders_content_and_resume_reads_it(call, finished, workplace):
    arguments = (*PAIR, *SMALL, "--dictionary", "df-crosscoder", "--out", "df-out-crosscoder")
    shown = call(*arguments, "--resume", "--json")
    assert shown.code == 0, shown.err
    printed, (stored, _) = json.loads(shown.out), read(workplace, "df-out-crosscoder")
    assert printed.pop("path") == "df-out-crosscoder" and printed == stored
    shown = call(*arguments)
    assert shown.code == 2 and "--overwrite" in shown.err
    shown = call(*PAIR, *SMALL, "--dictionary", "df-sae", "--out", "df-out-crosscoder", "--resume")
    assert shown.code == 2 and "dictionary" in shown.err
    info = call("info", "df-out-crosscoder")
    assert info.code == 0 and "diff (complete" in info.out


def test_an_interrupted_run_goes_on(call, workplace, monkeypatch):
    from palimpsest.diff import run

    arguments = (*PAIR, *SMALL, "--dictionary", "df-crosscoder", "--out", "df-interrupted")

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(run, "patch_pair", interrupt)
        shown = call(*arguments)
    assert shown.code == 130 and "--resume goes on" in shown.err
    monkeypatch.setattr(run, "collect_statistics", interrupt)
    shown = call(*arguments, "--resume")
    assert shown.code == 0 and "Of 64 latents" in shown.out


def test_first_tokens_of_answers(call, workplace):
    for out, text in (
        ("df-chat", ("df-chat.jsonl",)),
        ("df-talk", ("df-talk.jsonl", "--dialogue", "User:", "Assistant:")),
    ):
        shown = call(
            *split("diff base tuned --dictionary df-crosscoder"),
            *SMALL,
            "--corpus",
            *text,
            "--out",
            f"{out}-out",
        )
        assert shown.code == 0, shown.err
        data, _ = read(workplace, f"{out}-out")
        assert {row["positions"] for row in data["patching"]} == {"all", "first"}
        assert "template" in {row["set"] for row in data["patching"]}


def test_a_null_model_is_a_pair_of_its_own(call, finished, workplace):
    null = split(f"diff null base tuned --corpus general.jsonl --site {SITE} --tokens 300 --out df-null")
    shown = call(*null)
    assert shown.code == 0 and "A null model in df-null" in shown.out, shown.err
    again = call(*null, "--json", "--resume")
    data = json.loads(again.out)
    assert data["drift"]["null"] == pytest.approx(data["drift"]["tuned"], rel=0.01)
    shown = call(
        *split("diff base df-null --corpus general.jsonl --dictionary df-crosscoder --out df-null-out"),
        *QUICK,
    )
    assert shown.code == 0, shown.err
    assert read(workplace, "df-null-out")[0]["pair"] == {"base": "base", "tuned": "df-null"}
    shown = call(*split("diff compare df-out-crosscoder df-null-out --out df-other-pair"))
    assert shown.code == 2 and shown.err.count("\n") == 1 and not (workplace / "df-other-pair").exists()
    info = call("info", "df-null")
    assert info.code == 0 and "null-model (complete" in info.out


def test_twins_nulls_and_behaviours(call, finished, workplace):
    (workplace / "df-behaviour.jsonl").write_text(
        '{"prompt": "seven apples", "wanted": " and flour", "unwanted": " left"}\n' * 3
    )
    shown = call(
        *PAIR,
        *SMALL,
        *split("--dictionary df-crosscoder --twin df-crosscoder-2 --null df-null-out"),
        *split("--behaviour fruit=df-behaviour.jsonl --no-patch --out df-everything"),
    )
    assert shown.code == 0, shown.err
    data, table = read(workplace, "df-everything")
    (twin,) = data["stability"]
    assert twin["twin"] == "df-crosscoder-2" and twin["alive"]["mean"] < 0.7
    assert "stability" in table.column_names and "behaviour[fruit]" in table.column_names
    assert data["tuned_only"]["null"] is not None and len(data["nulls"]) == 1
    assert any("df-null-out differs in tokens" in note for note in data["notes"])
    assert [one["objective"] for one in data["attribution"]] == ["kl", "fruit"]
    # What a run reads is known by its content, so that an edited file is not taken for the same run.
    inputs = open_artifact(workplace / "df-everything").inputs
    assert inputs["behaviour/0"]["sha256"] and inputs["twin/0"]["sha256"] and inputs["null/0"]["sha256"]
    for null, words in (("df-out-crosscoder", "this very pair"), ("df-out-sae", "another method")):
        shown = call(*PAIR, *QUICK, *split(f"--dictionary df-crosscoder --null {null} --out df-nothing"))
        assert shown.code == 2 and words in shown.err and not (workplace / "df-nothing").exists()


def test_a_dictionary_of_another_pair_is_refused_unless_asked_for(call, workplace):
    from palimpsest.dictionaries import load_dictionary

    made = load_dictionary(workplace / "df-crosscoder")
    made.metadata |= {"model": {"base": "somebody/else", "tuned": "tuned"}}
    made.save_pretrained(workplace / "df-foreign")
    arguments = (*PAIR, *QUICK, "--dictionary", "df-foreign", "--out", "df-foreign-out")
    shown = call(*arguments)
    assert shown.code == 2 and "somebody/else" in shown.err and "--other-pair" in shown.err
    assert call(*arguments, "--other-pair").code == 0


def test_side_by_side(call, finished, workplace):
    runs = [f"df-out-{name}" for name in VIEWS]
    shown = call("diff", "compare", *runs, "--out", "df-compare")
    assert shown.code == 0, shown.err
    for name in ("crosscoder", "diff-sae", "tuned-sae"):
        assert name in shown.out
    again = call("diff", "compare", *runs, "--out", "df-compare", "--resume", "--json")
    assert again.code == 0 and len(json.loads(again.out)["rows"]) == 3
    assert {"compare.json", "compare.md"} <= set(open_artifact(workplace / "df-compare").files)
    for arguments, words in (
        ((runs[0],), "two or more"),
        ((runs[0], runs[0]), "itself"),
        ((runs[0], "sae"), "sae"),
    ):
        shown = call("diff", "compare", *arguments, "--out", "df-nothing")
        assert shown.code == 2 and words in shown.err and not (workplace / "df-nothing").exists()


def edited_dictionary(workplace, name, change, **fields):
    """A copy of the crosscoder with other weights, whose hashes are right."""
    import torch

    from palimpsest.dictionaries import Dictionary

    torch.manual_seed(5)
    options = {"k": 8, "models": 2, "view": "pair", "metadata": {"site": SITE}} | fields
    made = Dictionary(options.pop("d_model", 32), 64, **options)
    change(made.requires_grad_(False))
    folder = workplace / f"df-{name}"
    shutil.rmtree(folder, ignore_errors=True)
    made.save_pretrained(folder)


def nothing(_):
    """No change."""


def explode(made):
    made.W_enc[:, :, 5] = 1e38


@pytest.mark.parametrize(
    ("name", "change", "fields", "words"),
    [
        ("wide", nothing, {"d_model": 48}, "width 48"),
        ("three", nothing, {"models": 3}, "3 models"),
        ("normed", nothing, {"input_norm": "layer_norm"}, "input_norm"),
        ("normed-diff", nothing, {"input_norm": "unit_rms", "view": "diff", "models": 1}, "diff-sae"),
        ("nowhere", nothing, {"metadata": {}}, "--site"),
        ("far", nothing, {"metadata": {"site": "resid_post.7"}}, "layers run from 0 to 1"),
        ("huge", explode, {}, "NaN or infinit"),
    ],
)
def test_dictionaries_that_do_not_fit(call, workplace, tmp_path, name, change, fields, words):
    edited_dictionary(workplace, name, change, **fields)
    shown = call(*PAIR, *QUICK, "--dictionary", f"df-{name}", "--out", tmp_path / "out")
    assert shown.code == 2 and words in shown.err and shown.out == ""
    assert shown.err.startswith("palimpsest diff: ") and shown.err.count("\n") == 1
    assert name == "huge" or not (tmp_path / "out").exists()


def test_nan_weights_are_refused(call, workplace, tmp_path):
    def spoil(made):
        made.W_dec[3, 1, 2] = float("nan")

    edited_dictionary(workplace, "nan", spoil)
    shown = call(*PAIR, *QUICK, "--dictionary", "df-nan", "--out", tmp_path / "out")
    assert shown.code == 2 and "NaN" in shown.err and not (tmp_path / "out").exists()


def test_a_model_that_gives_nan_is_refused(call, workplace, tmp_path):
    from safetensors.torch import load_file, save_file

    shutil.copytree(workplace / "tuned", workplace / "df-sick")
    path = workplace / "df-sick" / "model.safetensors"
    weights = load_file(path)
    weights["model.layers.0.mlp.down_proj.weight"][0, 0] = float("inf")
    save_file(weights, path, metadata={"format": "pt"})
    arguments = split("diff base df-sick --corpus general.jsonl --dictionary df-crosscoder")
    shown = call(*arguments, *QUICK, "--out", tmp_path / "out")
    assert shown.code == 2 and "df-sick gives logits that are not finite" in shown.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--dictionary df-crosscoder --site mlp_act.0", "width 64"),
        ("--dictionary df-crosscoder --site nonsense", "no site 'nonsense'"),
        ("--dictionary df-nothing-at-all", "df-nothing-at-all"),
        ("--dictionary df-crosscoder --positions first", "--dialogue"),
        ("--dictionary df-crosscoder --positions last", "last"),
        ("--dictionary df-crosscoder --one-at-a-time", "--one-at-a-time"),
        ("--dictionary df-crosscoder --null sae", "sae"),
        ("--dictionary df-crosscoder --null nowhere/at/all", "nowhere/at/all"),
        ("--dictionary df-crosscoder --twin df-sae", "another kind"),
        ("--dictionary df-crosscoder --twin df-absent", "df-absent"),
        ("--dictionary df-crosscoder --twin df-crosscoder", "dictionary itself"),
        ("--dictionary df-crosscoder --behaviour absent.jsonl", "absent.jsonl"),
        ("--dictionary df-crosscoder --behaviour general.jsonl", "wanted"),
        ("--dictionary df-crosscoder --roles assistant", "no token to measure"),
        ("--dictionary df-crosscoder --dialogue User:", "two"),
        ("--dictionary df-crosscoder --tuned-only 0.5", "overlap"),
        ("--dictionary df-crosscoder --top-share 0", "top_share"),
        ("--dictionary df-crosscoder --differing 2", "differing"),
        ("--dictionary df-crosscoder --resamples 5", "resamples"),
        ("--dictionary df-crosscoder --confidence 1", "confidence"),
        ("--dictionary df-crosscoder --generate -1", "generate"),
        ("--dictionary df-crosscoder --tokens none", "--tokens"),
    ],
)
def test_bad_input_is_one_paragraph_and_leaves_nothing(call, tmp_path, arguments, words):
    shown = call(*PAIR, *split(arguments), "--out", tmp_path / "out")
    assert shown.code == 2 and shown.out == "" and words in shown.err, shown.err
    assert shown.err.startswith("palimpsest diff: ") and shown.err.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("absent.jsonl", "absent.jsonl"),
        ("general.jsonl general.jsonl", "different names"),
        ("a=general.jsonl a=math.jsonl", "different names"),
        ("df-one.jsonl", "checksums"),
    ],
)
def test_text_that_cannot_be_read(call, tmp_path, text, words):
    arguments = split("diff base tuned --dictionary df-crosscoder")
    shown = call(*arguments, "--corpus", *text.split(), "--out", tmp_path / "out")
    assert shown.code == 2 and words in shown.err and not (tmp_path / "out").exists(), shown.err


def test_a_document_alone_is_enough_without_the_causal_test(call, tmp_path):
    arguments = split("diff base tuned --dictionary df-crosscoder --corpus df-one.jsonl")
    shown = call(*arguments, *QUICK, "--out", tmp_path / "out")
    assert shown.code == 0, shown.err


def test_missing_arguments(call):
    for arguments, words in (
        ("diff base tuned --dictionary df-crosscoder --out df-x", "--corpus"),
        ("diff base tuned --corpus general.jsonl --out df-x", "--dictionary"),
        ("diff base --corpus general.jsonl --dictionary df-crosscoder --out df-x", "TUNED"),
        ("diff base tuned --corpus general.jsonl --dictionary df-crosscoder", "--out"),
    ):
        shown = call(*split(arguments))
        assert shown.code == 2 and words.lower() in shown.err.lower(), shown.err


def test_folders_that_are_taken(call, workplace, tmp_path):
    arguments = (*PAIR, *QUICK, "--dictionary", "df-crosscoder", "--out")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep")
    shown = call(*arguments, tmp_path / "mine")
    assert shown.code == 2 and "no artifact of palimpsest" in shown.err
    (tmp_path / "file").write_text("keep")
    shown = call(*arguments, tmp_path / "file")
    assert shown.code == 2 and shown.err.count("\n") == 1
    shown = call(*arguments, "df-crosscoder", "--overwrite")
    assert shown.code == 2 and (workplace / "df-crosscoder").is_dir()
    assert any((workplace / "df-crosscoder").glob("*.safetensors"))
