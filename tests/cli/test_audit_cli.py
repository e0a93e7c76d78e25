"""The whole way through the command line: train a dictionary, audit a pair, write the report, explain the folder."""

import json
import signal
import time
from shlex import split

import pyarrow.parquet
import pytest

KEYS = split(
    "schema summary command warnings pair site dictionary k ks mode tokens loss_measured kl_measured confidence "
    "resamples seed datasets tasks controls layers layers_note latents curve"
)
DATASET_KEYS = split(
    "name role source documents tokens skipped_tokens bad_rows intersection_mean ci list_length_share value_change "
    "value_change_ci fve l0 r2_delta r2_delta_ci blind loss delta_loss delta_loss_ci kl kl_ci relative_drift "
    "relative_drift_ci"
)
TASK_KEYS = split(
    "name k idr ci idr_abs idr_abs_ci churn_ratio churn_ratio_ci minimum_detectable_idr calibrated z p_null "
    "p_exchange q delta_loss delta_loss_ci kl kl_ci relative_drift relative_drift_ci kind declared verdict"
)
CURVE = split("dataset role k intersection_mean lo hi idr idr_lo idr_hi idr_abs churn_ratio")
LATENTS = split(
    "dataset latent contribution contribution_entered contribution_left entered left rate_base rate_tuned mean_base "
    "mean_tuned selected change change_lo change_hi p q examples"
)
CORPORA = ["--general", "general.jsonl", "--task", "math=math.jsonl"]


@pytest.fixture(scope="module")
def trained(command):
    done = command(
        *split(
            "train sae --model base --corpus general.jsonl math.jsonl --site resid_post.50% --latents 0.064k"
        ),
        *split("--k 8 --tokens 3k --batch-size 0.5k --lr 0.002 --max-length 0.1k --json --out trained"),
    )
    assert done.code == 0, done.err
    return done


@pytest.fixture(scope="module")
def audited(command, trained, workplace):
    done = command(
        *split(
            "audit base tuned --dictionary trained --general general.jsonl --task math=math.jsonl code=code.jsonl"
        ),
        *split(
            "--kl --k-max 8 --resamples 0.2k --tokens-per-batch 1k --site resid_post.50% --json --out run"
        ),
    )
    assert done.code == 0, done.err
    return done, json.loads((workplace / "run" / "audit.json").read_text())


def _audit(folder):
    return json.loads((folder / "audit.json").read_text())


def _manifest(folder):
    return json.loads((folder / "manifest.json").read_text())


def test_train_prints_one_json_and_resolves_its_options(trained, workplace):
    assert trained.out.count("\n") == 1 and trained.err == ""
    said = json.loads(trained.out)
    assert said["path"] == "trained"
    config = _manifest(workplace / "trained")["config"]["recipe"]
    assert (config["n_latents"], config["tokens"], config["batch_size"], config["lr"]) == (
        64,
        3000,
        500,
        0.002,
    )
    dictionary = json.loads((workplace / "trained" / "dictionary.json").read_text())
    assert dictionary["metadata"]["site"] == "resid_post.0"


def test_audit_prints_one_json_and_nothing_else(audited):
    done, written = audited
    assert done.out.count("\n") == 1 and done.err == ""
    assert json.loads(done.out) == written


def test_audit_writes_the_contract(audited, workplace):
    _, written = audited
    assert set(KEYS) <= written.keys()
    assert [set(DATASET_KEYS) - dataset.keys() for dataset in written["datasets"]] == [set()] * 3
    assert [set(TASK_KEYS) - task.keys() for task in written["tasks"]] == [set()] * 2
    assert [data["name"] for data in written["datasets"]] == ["general", "math", "code"]
    assert [data["role"] for data in written["datasets"]] == ["general", "task", "task"]
    assert (written["site"], written["ks"], written["resamples"]) == ("resid_post.0", list(range(1, 9)), 200)
    for data in written["datasets"]:
        assert list(data["intersection_mean"]) == [str(k) for k in range(1, 9)] == list(data["ci"])
        assert 0 < data["intersection_mean"]["5"] < 1 and data["documents"] == 14
        assert data["kl"] > 0 and data["loss"]["base"] > 0
    assert all(
        task[key] is None for task in written["tasks"] for key in ("kind", "verdict", "z", "calibrated")
    )
    curve = pyarrow.parquet.read_table(workplace / "run" / "curve.parquet")
    assert curve.column_names == CURVE and curve.num_rows == 3 * 8
    latents = pyarrow.parquet.read_table(workplace / "run" / "latents.parquet")
    assert set(LATENTS) <= set(latents.column_names)
    assert latents["latent"].to_pylist().count(-1) == 3
    assert (workplace / "run" / "report.html").read_text(encoding="utf-8").startswith("<!")


def test_the_recorded_command_is_the_one_that_was_given(audited):
    _, written = audited
    assert written["command"].startswith(
        "palimpsest audit base tuned --dictionary trained --general general.jsonl"
    )
    assert "--resamples 0.2k" in written["command"]


def test_report_and_info_read_the_folder(audited, command, workplace):
    inside = workplace / "run" / "report.html"
    before = inside.read_bytes()
    done = command("report", "run", "--out", "elsewhere.html", "--json")
    assert (done.code, done.err) == (0, "")
    told, page = json.loads(done.out), workplace / "elsewhere.html"
    assert told["report"] == "elsewhere.html" and told["files"] == {"elsewhere.html": page.stat().st_size}
    assert told["summary"] in audited[1]["summary"] and told["plots"] == 0
    assert page.stat().st_size > 10_000 and inside.read_bytes() == before
    done = command("info", "run")
    assert (done.code, done.err) == (0, "")
    assert done.out.startswith("audit (complete") and audited[1]["summary"] in done.out


def test_info_in_json_is_the_manifest(audited, call, workplace):
    said = json.loads(call("info", "run", "--json").out)
    assert said["stage"] == "audit" and said["files"] == _manifest(workplace / "run")["files"]


def test_plain_output_is_a_table_the_answer_and_the_report(call, audit_args):
    done = call(*audit_args, "--general", "general.jsonl", "--task", "[/b]=math.jsonl", "--out", "plain")
    assert (done.code, done.err) == (0, "")
    assert "[/b]" in done.out and "IDR_rel" in done.out and "Report: plain/report.html" in done.out
    assert "\x1b" not in done.out and "\r" not in done.out


def test_quiet_prints_nothing(call, audit_args):
    assert call(*audit_args, *CORPORA, "--quiet", "--out", "quiet") == (0, "", "")


def test_modes(call, audit_args, workplace):
    flags = ("--no-loss", "--legacy", "--controls", "--k", "3")
    done = call(*audit_args, *CORPORA, *flags, "--json", "--out", "modes")
    assert done.code == 0, done.err
    said = json.loads(done.out)
    assert (said["mode"], said["tokens"], said["k"]) == ("legacy", "all", 3)
    assert (said["loss_measured"], said["kl_measured"]) == (False, False)
    assert {control["name"] for control in said["controls"]} == {"random", "pca", "neurons"}
    for data in said["datasets"]:
        assert data["loss"] is None and data["delta_loss"] is None and data["kl"] is None
        assert 1 < data["intersection_mean"]["3"] <= 3
    plain = json.loads(call(*audit_args, *CORPORA, "--json", "--out", "modes-plain").out)
    assert plain["mode"] == "macro" and plain["loss_measured"] and not plain["kl_measured"]
    assert plain["controls"] is None or plain["controls"] == []
    assert plain["datasets"][0]["tokens"] < said["datasets"][0]["tokens"]


def test_switches_with_a_default_can_be_turned_off(call, audit_args, workplace):
    done = call(*audit_args, *CORPORA, "--no-prepend-bos", "--all-positions", "--json", "--out", "no-bos")
    with_bos = call(*audit_args, *CORPORA, "--prepend-bos", "--all-positions", "--json", "--out", "bos")
    without, kept = (json.loads(one.out)["datasets"][0]["tokens"] for one in (done, with_bos))
    assert kept - without == 14


CONFIG = {
    "toml": 'dictionary = "sae"\ngeneral = "general.jsonl"\nresamples = "0.1k"\nk_max = 6\nloss = false\n'
    'confidence = 0.9\nout = "from-toml"\n[task]\nmath = "math.jsonl"\ncode = "code.jsonl"\n',
    "yaml": "dictionary: sae\ngeneral: general.jsonl\nresamples: 100\nk-max: 6\nloss: false\nconfidence: 0.9\n"
    "out: from-yaml\ntask: [math=math.jsonl, code=code.jsonl]\nbase: another\n",
    "json": json.dumps(
        {
            "dictionary": "sae", "general": "general.jsonl", "resamples": 100, "k_max": 6, "loss": False,
            "confidence": 0.9, "out": "from-json", "task": ["math=math.jsonl", "code=code.jsonl"],
            "site": None, "load_kwargs": {"attn_implementation": "eager"},
        }
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", CONFIG)
def test_config_file_and_flags_that_win(kind, call, workplace):
    (workplace / f"audit.{kind}").write_text(CONFIG[kind])
    done = call("audit", "base", "tuned", "--config", f"audit.{kind}", "--k-max", "7", "--json")
    assert done.code == 0, done.err
    said = _audit(workplace / f"from-{kind}")
    assert (said["resamples"], said["confidence"], said["loss_measured"]) == (100, 0.9, False)
    assert said["ks"][-1] == 7 and said["pair"]["base"] == "base"
    assert [task["name"] for task in said["tasks"]] == ["math", "code"]


def test_flags_undo_a_config_files_switch_and_tasks(call, workplace):
    (workplace / "undone.toml").write_text(CONFIG["toml"].replace("from-toml", "undone"))
    done = call("audit", "base", "tuned", "--config=undone.toml", "--loss", "--task", "only=code.jsonl")
    assert done.code == 0, done.err
    said = _audit(workplace / "undone")
    assert said["loss_measured"] and [task["name"] for task in said["tasks"]] == ["only"]


def test_decimals_reach_the_recipe(call, workplace):
    (workplace / "recipe.toml").write_text('lr = 0.003\nwarmup = 0.1\nactivation = "batch_topk"\n')
    sizes = split("--latents 32 --tokens 1k --batch-size 256")
    where = split("--model base --corpus math.jsonl --site resid_post.1 --out decimals")
    done = call("train", "sae", *where, *sizes, "--k", "2.5", "--auxk-alpha", ".5", "--config", "recipe.toml")
    assert done.code == 0, done.err
    recipe = _manifest(workplace / "decimals")["config"]["recipe"]
    assert (recipe["k"], recipe["lr"], recipe["warmup"]) == (2.5, 0.003, 0.1)
    assert recipe["objective"]["auxk_alpha"] == 0.5


def test_harvest_reports_its_store(call, workplace):
    sites = ("--site", "resid_post.0", "resid_post.1")
    done = call(
        "harvest", "base", "--tuned", "tuned", "--corpus", "math.jsonl", *sites, "--out", "store", "--json"
    )
    assert done.code == 0, done.err
    said = json.loads(done.out)
    assert said["sites"] == ["resid_post.0", "resid_post.1"] and said["models"] == ["base", "tuned"]
    assert said["rows"] > 100 and "store" in call("info", "store").out


def test_a_task_name_never_becomes_a_path(call, audit_args, workplace):
    corpora = ["--general", "general.jsonl", "--task", "../../../escaped=math.jsonl"]
    before = {path for path in workplace.parent.rglob("*") if "escaped" in path.name}
    done = call(*audit_args, *corpora, "--one-at-a-time", "--json", "--out", "deep/er/run")
    assert done.code == 0, done.err
    assert json.loads(done.out)["tasks"][0]["name"] == "../../../escaped"
    assert before == {path for path in workplace.parent.rglob("*") if "escaped" in path.name} == set()


def test_a_finished_run_is_kept_unless_overwrite_is_said(call, audit_args, workplace):
    assert call(*audit_args, *CORPORA, "--out", "kept").code == 0
    first = (workplace / "kept" / "audit.json").read_bytes()
    again = call(*audit_args, *CORPORA, "--seed", "5", "--out", "kept")
    assert again.code == 2 and "--overwrite" in again.err and "finished run" in again.err
    assert (workplace / "kept" / "audit.json").read_bytes() == first
    other = call(*audit_args, *CORPORA, "--seed", "5", "--resume", "--out", "kept")
    assert other.code == 2 and "config.run.seed" in other.err
    assert call(*audit_args, *CORPORA, "--resume", "--out", "kept").code == 0
    assert (workplace / "kept" / "audit.json").read_bytes() == first
    assert call(*audit_args, *CORPORA, "--seed", "5", "--overwrite", "--out", "kept").code == 0
    assert _audit(workplace / "kept")["seed"] == 5
    assert call("info", "kept").code == 0


@pytest.fixture(scope="module")
def interrupted(start, workplace):
    """Stop an audit between its first and its second corpus, then interrupt it; yields it while it stands still."""
    (workplace / "long.jsonl").write_text((workplace / "code.jsonl").read_text() * 60)
    arguments = split("audit base tuned --dictionary sae --general general.jsonl --task long=long.jsonl")
    arguments += split("--resamples 100 --k-max 8 --out stopped")
    process = start(*arguments)
    part, deadline = workplace / "stopped" / "parts" / "000-dictionary.safetensors", time.monotonic() + 100
    while not part.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGSTOP)
    yield arguments, process
    process.kill()
    process.communicate()


def test_interrupt_lock_and_resume(interrupted, call, workplace):
    arguments, process = interrupted
    second = call(*arguments)
    assert second.code == 2 and f"process {process.pid}" in second.err and "another run" in second.err
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGCONT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (130, "")
    assert err.count("\n") == 1 and "--resume" in err
    assert "unfinished" in call("info", "stopped").out
    assert call("report", "stopped").code == 2
    plain = call(*arguments)
    assert plain.code == 2 and "--resume" in plain.err and "--overwrite" in plain.err
    resumed = call(*arguments, "--resume")
    assert resumed.code == 0, resumed.err
    timings = _manifest(workplace / "stopped")["timings"]
    assert "measure general" not in timings and timings["measure long"] > 0
    assert not (workplace / "stopped" / "parts").exists()


def test_a_resumed_run_says_what_an_uninterrupted_one_says(interrupted, call, workplace):
    arguments, _ = interrupted
    assert call(*arguments[:-1], "through").code == 0
    one, other = _audit(workplace / "stopped"), _audit(workplace / "through")
    assert one.pop("command") and other.pop("command") and one == other
