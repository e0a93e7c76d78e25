"""Sweeps and tables of baselines: the same data and steps for all, planted directions found, nothing trained twice."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from audit_world import make_dictionary, write_corpus
from pair_fixture import load_hf
from palimpsest.cli import main
from palimpsest.dictionaries import Dictionary, load_dictionary
from palimpsest.errors import ConfigError
from palimpsest.models import load_model
from palimpsest.options import CorpusOptions, ModelOptions, RunOptions
from palimpsest.tune import baselines as table
from palimpsest.tune import diffmean, versions
from palimpsest.tune.baselines import run_baselines
from palimpsest.tune.baselines_config import BaselineOptions, BaselinesConfig, method_config
from palimpsest.tune.config import AdapterOptions, LogOptions, ObjectiveOptions, ScheduleOptions
from palimpsest.tune.contrast import read_contrast, sides
from palimpsest.tune.data import load_data
from palimpsest.tune.measure import Yardstick
from palimpsest.tune.sweep import run_sweep
from palimpsest.tune.sweep_config import SweepConfig, SweepOptions, combinations

SITE, LATENTS = "resid_post.0", 96
DIGITS = [str(n) for n in range(7, 4000, 211)]
LETTERS = ["quick", "brown", "foxes", "jump", "over", "lazy", "dogs", "while", "zebras", "vex", "my", "job"]


@pytest.fixture(scope="module")
def world(tmp_path_factory, tiny_llama):
    root = tmp_path_factory.mktemp("baselines")
    return SimpleNamespace(
        base=str(tiny_llama()),
        dictionary=make_dictionary(root / "dictionary", "relu"),
        data=write_corpus(root / "digits.jsonl", DIGITS, documents=30),
        general=write_corpus(root / "letters.jsonl", LETTERS, documents=20, seed=1),
        more=write_corpus(root / "more.jsonl", LETTERS, documents=20, seed=2),
    )


def config(world, out, kind=BaselinesConfig, *, general=True, resume=False, **more):
    fields = {
        "run": RunOptions(out=out, resume=resume),
        "dictionary": (world.dictionary,),
        "objective": ObjectiveOptions(
            data=(world.data,), general=(world.general,) if general else (), eval_rows=12
        ),
        "schedule": ScheduleOptions(steps=3, batch_size=4),
        "models": ModelOptions(device="cpu", tokens_per_batch=256),
        "corpora": CorpusOptions(max_length=48),
    }
    return kind(world.base, **fields | more)


@pytest.fixture(scope="module")
def compared(world, tmp_path_factory):
    asked = ("scale", "lora", "vector", "diffmean", "best-latent", "latents")
    made = config(
        world,
        tmp_path_factory.mktemp("compared") / "out",
        baselines=BaselineOptions(methods=asked, method_lrs=("lora=1e-4",)),
        adapter=AdapterOptions(latents=("3", "5")),
    )
    return made, run_baselines(made)


def result(made, name):
    return json.loads((made.run.out / name / "tune.json").read_text())


def test_the_table_holds_what_each_adapter_says(compared):
    made, board = compared
    assert sorted(line.name for line in board.lines) == sorted(made.methods)
    assert [line.objective["after"] for line in board.lines] == sorted(
        line.objective["after"] for line in board.lines
    )
    assert board.to_dict() == json.loads((made.run.out / "baselines.json").read_text())
    text = (made.run.out / "baselines.md").read_text()
    for line in board.lines:
        own = result(made, line.name)
        assert line.objective == own["objective_value"]
        assert line.kl == own["general"]["kl"]
        assert line.parameters == own["parameters"]
        assert line.objective["before"] == board.lines[0].objective["before"]
        assert f"| {line.name} |" in text
        assert line.latents_needed is None or line.name in ("scale", "best-latent", "latents")
    by = {line.name: line for line in board.lines}
    assert by["vector"].parameters == by["diffmean"].parameters == 32
    assert (by["best-latent"].parameters, by["latents"].parameters, by["scale"].parameters) == (1, 2, LATENTS)
    assert (by["lora"].lr, by["scale"].lr, by["diffmean"].lr) == (1e-4, 0.03, None)
    assert by["lora"].latents_moved is by["vector"].latents_moved is None
    assert by["latents"].latents_moved == 2


def test_every_method_learns_from_the_same_rows(compared):
    made, _ = compared
    for name in ("scale", "lora", "vector", "best-latent", "latents"):
        manifest = json.loads((made.run.out / name / "manifest.json").read_text())
        assert manifest["config"]["schedule"]["steps"] == 3
        assert manifest["config"]["objective"]["data"] == list(made.objective.data)
        assert result(made, name)["rows"] == result(made, "diffmean")["rows"]


def answered(model, rows):
    """Activations of the labelled tokens of each row, read one row at a time."""
    seen = []
    handle = model.model.layers[0].register_forward_hook(
        lambda _m, _a, out: seen.append(out[0] if isinstance(out, tuple) else out)
    )
    with torch.no_grad():
        for row in rows:
            model(input_ids=torch.tensor([row.input_ids]))
    handle.remove()
    kept = [torch.tensor(row.labels) != -100 for row in rows]
    return [one.reshape(-1, 32)[keep].double() for one, keep in zip(seen, kept, strict=True)]


def read(world, made):
    language = load_model(world.base, made.models)
    data = load_data(made, language)
    texts = sides(made.objective, data, 12)
    dictionary = load_dictionary(world.dictionary)
    return language, data, texts, dictionary, read_contrast(language, {SITE: dictionary}, texts, 100)[SITE]


def test_the_difference_of_means_is_the_plain_one_at_the_best_strength(world, compared, tmp_path):
    from peft import PeftModel

    made, _ = compared
    language, data, texts, _, contrast = read(world, made)
    wanted, other = (torch.cat(answered(language.model, side)) for side in texts)
    difference = wanted.mean(0) - other.mean(0)
    unit = difference / difference.norm()
    torch.testing.assert_close(contrast.direction, unit, rtol=1e-5, atol=1e-6)
    length = torch.cat([wanted, other]).norm(dim=1).mean()
    assert contrast.norm == pytest.approx(length.item(), rel=1e-6)

    found = {}
    for strength in diffmean.STRENGTHS:
        handle = language.model.model.layers[0].register_forward_hook(
            lambda _m, _a, out, s=strength: _plus(out, (unit * s * length).float())
        )
        found[strength] = Yardstick(language, made.objective, data.train[:12]).measure(language.model).value
        handle.remove()
    own = result(made, "diffmean")
    for tried in own["tried"]:
        # BOS is left alone by the adapter and moved by the plain hook.
        assert tried["value"] == pytest.approx(found[tried["strength"]], rel=2e-2)
    assert own["strength"] == min(own["tried"], key=lambda one: one["value"])["strength"]

    model = PeftModel.from_pretrained(load_hf(world.base), str(made.run.out / "diffmean"))
    (vector,) = [one for name, one in model.named_parameters() if "latent_" in name]
    torch.testing.assert_close(vector.double(), unit * own["strength"] * length, rtol=1e-4, atol=1e-5)
    heldout = Yardstick(language, made.objective, data.heldout[:12]).measure(model.eval()).value
    assert heldout == pytest.approx(own["objective_value"]["after"], rel=1e-5)


def _plus(out, vector):
    if isinstance(out, tuple):
        return (out[0] + vector, *out[1:])
    return out + vector


def test_the_best_latent_is_that_of_a_dense_computation(world, compared):
    made, board = compared
    language, _, texts, dictionary, contrast = read(world, made)
    means = []
    for side in texts:
        rows = [
            dictionary.encode(one.float()).dense().double().mean(0) for one in answered(language.model, side)
        ]
        means.append(torch.stack(rows))
    deviation = ((means[0].var(0) + means[1].var(0)) / 2).sqrt()
    wanted = torch.where(deviation > 0, (means[0].mean(0) - means[1].mean(0)) / deviation, 0.0)
    torch.testing.assert_close(contrast.standardised(), wanted, rtol=1e-4, atol=1e-5)
    best = int(wanted.abs().argmax())
    assert wanted.abs()[best] > 2
    note = next(line.note for line in board.lines if line.name == "best-latent")
    assert f"latent {best} at {SITE}" in note
    config_of = json.loads((made.run.out / "best-latent" / "adapter_config.json").read_text())
    assert config_of["latents"] == [best]


def test_a_planted_latent_is_found_and_equal_texts_have_none(world, tmp_path):
    made = config(world, tmp_path / "out")
    language, _, texts, *_ = read(world, made)
    dictionary = Dictionary(32, 12, activation="relu")
    planted = 7
    acts = [torch.cat(answered(language.model, side)) for side in texts]
    which = torch.cat([torch.ones(len(acts[0])), torch.zeros(len(acts[1]))]).double()
    known = torch.cat([torch.cat(acts), torch.ones(len(which), 1)], 1)
    reader = torch.linalg.lstsq(known, which[:, None], driver="gelsd").solution[:, 0].float()
    with torch.no_grad():
        # The planted latent tells the tokens of one text from those of the other, above half of the way.
        dictionary.W_enc[0, :, planted] = reader[:-1]
        dictionary.b_enc[planted] = reader[-1] - 0.5 + dictionary.b_dec[0] @ reader[:-1]
    found = read_contrast(language, {SITE: dictionary}, texts, 100)[SITE].standardised()
    assert int(found.abs().argmax()) == planted
    assert found[planted] > 0
    same = replace(made.objective, data=(world.general,), general=(world.more,))
    other = replace(made, objective=same)
    null_texts = sides(same, load_data(other, language), 12)
    null = read_contrast(language, {SITE: dictionary}, null_texts, 100)[SITE].standardised()
    assert null.abs().max() < found[planted] / 2


def test_resuming_keeps_what_is_finished(world, tmp_path, monkeypatch):
    methods = ("scale", "diffmean", "vector")
    made = config(world, tmp_path / "out", baselines=BaselineOptions(methods=methods))
    true, trained = table.train_version, []

    def broken(one, *rest):
        trained.append(one.run.out.name)
        if one.run.out.name == "vector" and len(trained) < 3:
            raise KeyboardInterrupt
        return true(one, *rest)

    monkeypatch.setattr(table, "train_version", broken)
    with pytest.raises(KeyboardInterrupt):
        run_baselines(made)
    stamps = {name: (made.run.out / name / "manifest.json").read_bytes() for name in methods[:2]}
    again = replace(made, run=replace(made.run, resume=True))
    board = run_baselines(again)
    assert stamps == {name: (made.run.out / name / "manifest.json").read_bytes() for name in methods[:2]}
    assert len(board.lines) == 3
    assert run_baselines(again).to_dict() == board.to_dict()
    assert len(trained) == 4


def test_a_sweep_ranks_and_warns(world, tmp_path):
    swept = SweepOptions(components=("scale", "vector"), lrs=(1e-6, 0.3), l1s=(0.0, 10.0))
    names = combinations(config(world, tmp_path / "out", SweepConfig, sweep=swept))
    assert set(names) == {
        *(f"scale-lr-{lr}-l1-{l1}" for lr in ("1e-06", "0.3") for l1 in ("0", "10")),
        "vector-lr-1e-06",
        "vector-lr-0.3",
    }
    assert names["scale-lr-0.3-l1-10"].schedule.l1 == 10
    made = config(world, tmp_path / "out", SweepConfig, sweep=SweepOptions(lrs=(1e-6, 0.3)))
    board = run_sweep(made)
    after = [line.objective["after"] for line in board.lines]
    assert after == sorted(after)
    assert [line.best for line in board.lines] == [True, False]
    assert "too good" in (made.run.out / "leaderboard.md").read_text()
    by = {line.name: line for line in board.lines}
    small, large = (by[f"scale-lr-{lr}"] for lr in ("1e-06", "0.3"))
    assert abs(small.objective["difference"]) < 1e-4 < abs(large.objective["difference"])
    assert small.kl < large.kl
    saved = json.loads((made.run.out / "leaderboard.json").read_text())
    assert saved == board.to_dict()


def test_training_that_broke_off_has_a_line(world, tmp_path, monkeypatch):
    from palimpsest.errors import NumericsError
    from palimpsest.tune import run as stage

    true = stage._tune

    def stopped(asked, *rest):
        found = true(asked, *rest)
        if asked.lr > 0.01:
            folder = rest[-1]
            folder.write_json(
                "tune.json",
                found
                | {
                    "stopped": "the loss was not finite",
                    "objective_value": {**found["objective_value"], "after": None, "difference": None},
                },
            )
        return found

    monkeypatch.setattr(stage, "_tune", stopped)
    made = config(world, tmp_path / "out", SweepConfig, sweep=SweepOptions(lrs=(0.1, 0.001)))
    board = run_sweep(made)
    assert [line.name for line in board.lines] == ["scale-lr-0.001", "scale-lr-0.1"]
    assert board.lines[1].stopped
    assert any("not finite" in remark for remark in board.remarks())
    with pytest.raises(NumericsError):
        one = combinations(made)["scale-lr-0.1"]
        versions.run_tune(replace(one, run=replace(one.run, resume=True)))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"baselines": {"methods": ("sparkle",)}}, "Unknown method"),
        ({"baselines": {"methods": ("lora", "lora")}}, "named twice"),
        ({"baselines": {"methods": ("latents",)}}, "needs --latents"),
        ({"baselines": {"method_lrs": ("lora=fast",)}}, "no learning rate"),
        ({"baselines": {"method_lrs": ("diffmean=1",)}}, "no trained method"),
    ],
)
def test_bad_options_are_refused(world, tmp_path, more, message):
    with pytest.raises(ConfigError, match=message):
        config(world, tmp_path / "out", baselines=BaselineOptions(**more["baselines"]))


def test_without_general_text_there_is_no_contrast(world, tmp_path):
    usual = config(world, tmp_path / "out", general=False)
    assert not {"diffmean", "best-latent"} & set(usual.methods)
    asked = config(world, tmp_path / "out", general=False, baselines=BaselineOptions(methods=("diffmean",)))
    with pytest.raises(ConfigError, match="no two kinds of text"):
        run_baselines(asked)


@pytest.mark.parametrize("swept", [{"components": ("sparkle",)}, {"lrs": (0.0,)}, {"l1s": (-1.0,)}])
def test_bad_sweeps_are_refused(swept):
    with pytest.raises(ConfigError):
        SweepOptions(**swept)


def test_options_of_one_component_do_not_reach_another(world, tmp_path):
    adapter = AdapterOptions(component="low-rank", rank=3, forbid=("1",), scope="all")
    made = config(world, tmp_path / "out", adapter=adapter, log=LogOptions(log_every=1))
    assert method_config(made, "low-rank").adapter.rank == 3
    assert method_config(made, "lora").adapter == AdapterOptions(component="lora")
    assert method_config(made, "bias").adapter.forbid == ("1",)
    assert method_config(made, "vector").adapter.forbid == ()


def test_the_command_line(world, tmp_path, capsys):
    common = [
        "--dictionary",
        world.dictionary,
        "--data",
        world.data,
        "--general",
        world.general,
        "--device",
        "cpu",
    ]
    common += ["--steps", "2", "--eval-rows", "4", "--max-length", "48"]
    assert main(["tune", "sweep", world.base, *common, "--lrs", "0.1", "--out", str(tmp_path / "s")]) == 0
    out = capsys.readouterr().out
    assert "scale-lr-0.1" in out
    assert "lowest held-out objective" in out
    code = main(
        [
            "tune",
            "baselines",
            world.base,
            *common,
            "--methods",
            "vector",
            "--out",
            str(tmp_path / "b"),
            "--json",
        ]
    )
    assert code == 0
    found = json.loads(capsys.readouterr().out)
    assert [line["name"] for line in found["lines"]] == ["vector"]
    assert np.isfinite(found["lines"][0]["objective"]["after"])
    assert main(["tune", "sweep", world.base, *common, "--out", str(tmp_path / "n")]) == 2
    assert "nothing to sweep" in capsys.readouterr().err
