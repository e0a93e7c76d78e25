"""What strengths cost, how far they may go, what they are compared with, and a run that was interrupted."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from helpers import assert_close
from latent_world import dictionary
from pair_fixture import fine_tune
from palimpsest.artifacts import open_artifact
from palimpsest.corpus import Corpus
from palimpsest.errors import ConfigError
from palimpsest.evaluate.sums import DocumentTable
from palimpsest.evaluate.text import evaluation_batches
from palimpsest.interpret.steering import run as stage
from palimpsest.interpret.steering.behaviour import encode_watched, log_probabilities
from palimpsest.interpret.steering.changes import Change
from palimpsest.interpret.steering.config import SteerConfig, SweepOptions, WritingOptions
from palimpsest.interpret.steering.controls import Habits, control_changes, habits, matched_latents
from palimpsest.interpret.steering.prompts import read_prompts
from palimpsest.interpret.steering.result import Cost, SteeringRun
from palimpsest.interpret.steering.steerer import Steerer
from palimpsest.interpret.steering.sweep import Settings, costs, largest_ok, measure, unsteered
from palimpsest.interpret.subject import subject_from
from palimpsest.models import load_pair, replace
from palimpsest.options import ModelOptions, RunOptions

SITE = "resid_post.1"
MODELS = ModelOptions(device="cpu", tokens_per_batch=256)
WORDS = [
    "river",
    "mill",
    "counts",
    "sacks",
    "of",
    "flour",
    "and",
    "returns",
    "sum",
    "seven",
    "apples",
    "left",
]
LOUD, MUTE, DEAD = 5, 9, 11


@pytest.fixture(scope="module")
def world(tmp_path_factory, tiny_llama, tiny_tokenizer):
    """A pair, text, and dictionaries: one latent says nothing but EOS, one is written nowhere, one never fires."""
    root = tmp_path_factory.mktemp("strengths")
    found = SimpleNamespace(root=root, base=tiny_llama(seed=3, num_hidden_layers=3))
    found.tuned = fine_tune(found.base, root / "tuned", tiny_tokenizer)
    found.pair = load_pair(found.base, found.tuned, MODELS)
    rng = np.random.default_rng(0)
    rows = [{"text": " ".join(rng.choice(WORDS, 9))} for _ in range(10)]
    found.corpus = root / "text.jsonl"
    found.corpus.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for view in ("base", "pair"):
        made = dictionary(
            "relu", seed=7, view=view, models=2 if view == "pair" else 1, metadata={"site": SITE}
        )
        with torch.no_grad():
            head = found.pair.base.model.get_output_embeddings().weight[2]
            made.W_dec[LOUD] = head / head.norm()
            made.W_dec[MUTE] = 0
            made.b_enc[DEAD] = -1e4
        made.save_pretrained(root / view)
        setattr(found, f"{view}_dictionary", made)
    return found


def tool(world, view="base"):
    return Steerer(subject_from(world.pair, getattr(world, f"{view}_dictionary"), SITE))


def batches(world):
    return evaluation_batches(Corpus(world.corpus, world.pair.tokenizer), 10_000, 128)


def slowly(world, side, change):
    """Per document: predictions, CE as it is, CE and KL steered; densely, one document at a time, in float64."""
    model, made, rows = world.pair.side(side), world.base_dictionary, []
    for document in Corpus(world.corpus, world.pair.tokenizer).documents():
        ids = torch.tensor(document.token_ids[None]).long()
        hidden = model.read(ids, [SITE]).acts[SITE][0].double()
        z = (hidden - made.b_dec[0].double()) @ made.W_enc[0].double() + made.b_enc.double()
        own = z.relu()[:, change.latent]
        new = own * change.factor + change.constant
        edited = hidden + (new - own)[:, None] * made.W_dec[change.latent, 0].double()
        edited[0] = hidden[0]
        logits = []
        for acts in (hidden, edited):
            with (
                torch.inference_mode(),
                replace(model.sites, SITE, lambda h, acts=acts: acts.to(h.dtype)[None]),
            ):
                logits.append(model.model(ids, use_cache=False).logits[0].double().log_softmax(-1))
        target = ids[0, 1:, None]
        ce = [-one[:-1].gather(1, target).sum() for one in logits]
        kl = (logits[0].exp() * (logits[0] - logits[1]))[:-1].sum()
        rows.append([len(target), float(ce[0]), float(ce[1]), float(kl)])
    return np.array(rows)


@pytest.mark.parametrize("side", ["base", "tuned"])
def test_losses_are_those_of_whole_dense_passes(world, side):
    change = Change(LOUD, "clamp", 3.0)
    found = measure(tool(world), side, [[change], [Change(MUTE, "add", 50.0)]], batches(world))
    expected = slowly(world, side, change)
    assert_close(found.sums[:, [0, 1, 2, 3]], expected, rtol=1e-4, atol=1e-4)
    own, mute = costs(found, Settings())
    total = expected.sum(0)
    assert own.loss == pytest.approx(total[2] / total[0], rel=1e-5)
    assert own.perplexity_ratio == pytest.approx(math.exp((total[2] - total[1]) / total[0]), rel=1e-5)
    assert own.kl == pytest.approx(total[3] / total[0], rel=1e-3)
    assert own.kl > 0.001 and own.perplexity_ratio_ci[0] < own.perplexity_ratio < own.perplexity_ratio_ci[1]
    assert (mute.perplexity_ratio, mute.perplexity_ratio_ci, mute.kl) == (1.0, (1.0, 1.0), 0.0)
    assert unsteered(found) == {
        "loss": pytest.approx(total[1] / total[0]),
        "documents": 10,
        "tokens": int(total[0]),
    }


def test_intervals_are_over_documents_and_paired():
    rng = np.random.default_rng(1)
    hard = rng.normal(300, 80, 40)
    sums = np.stack([np.full(40, 100.0), hard, hard + 10.0, np.full(40, 5.0)], 1)
    (cost,) = costs(DocumentTable(np.arange(40), sums), Settings())
    assert cost.perplexity_ratio == pytest.approx(math.exp(0.1))
    assert cost.perplexity_ratio_ci[1] - cost.perplexity_ratio_ci[0] < 1e-9, "documents' own losses cancel"
    noise = rng.normal(0, 20, 40)
    sums[:, 2] = hard + 10 + noise
    (cost,) = costs(DocumentTable(np.arange(40), sums), Settings())
    half = 1.96 * noise.std() / 100 / math.sqrt(40)
    width = math.log(cost.perplexity_ratio_ci[1] / cost.perplexity_ratio_ci[0])
    assert width == pytest.approx(2 * half, rel=0.25)
    (few,) = costs(DocumentTable(np.arange(5), sums[:5]), Settings())
    assert few.perplexity_ratio_ci is None and few.kl_ci is None


def test_a_ratio_beyond_every_number_has_no_interval():
    sums = np.stack([np.full(9, 1.0), np.full(9, 3.0), np.full(9, 900.0), np.full(9, 5.0)], 1)
    (found,) = costs(DocumentTable(np.arange(9), sums), Settings())
    assert found.perplexity_ratio is None and found.perplexity_ratio_ci is None and found.kl == 5.0
    assert largest_ok([(1.0, found)], 1.5) is None


def cost(ratio, upper=None):
    return Cost(3.0, ratio, None if upper is None else (ratio, upper), 0.1, None)


@pytest.mark.parametrize(
    ("ratios", "largest"),
    [
        ([(0, 1.0, 1.0), (1, 1.1, 1.2), (2, 1.4, 1.49), (4, 3.0, 3.5)], 2),
        ([(0, 1.0, 1.0), (1, 1.1, 1.2), (2, 1.4, 1.51), (4, 1.2, 1.3)], 1),
        ([(4, 1.0, 1.0), (1, 1.0, 1.0), (2, 1.0, 1.0)], 4),
        ([(1, 1.6, 1.7), (2, 1.0, 1.0)], None),
        ([(1, 1.4, None), (2, 1.6, None)], 1),
        ([(1, 1.4, 1.45), (2, float("nan"), None)], 1),
        ([(1, float("inf"), None)], None),
        ([], None),
    ],
)
def test_the_guard_stops_at_the_first_strength_that_may_break_the_model(ratios, largest):
    assert largest_ok([(float(s), cost(ratio, upper)) for s, ratio, upper in ratios], 1.5) == largest


def test_what_latents_do_on_the_text(world):
    for view in ("base", "pair"):
        subject = tool(world, view).subject
        found = habits(subject, "tuned", batches(world))
        fires, mass, tokens = np.zeros(96), np.zeros(96), 0
        for document in Corpus(world.corpus, world.pair.tokenizer).documents():
            ids = torch.tensor(document.token_ids[None]).long()
            acts = [subject.model(side).read(ids, [SITE]).acts[SITE][0, 1:] for side in ("base", "tuned")]
            codes = subject.dictionary.encode(torch.stack(acts, 1) if view == "pair" else acts[1]).dense()
            fires += (codes > 0).sum(0).numpy()
            mass += codes.sum(0).numpy()
            tokens += len(codes)
        assert found.tokens == tokens and found.rate[DEAD] == 0 == found.mean[DEAD]
        assert_close(found.rate, fires / tokens)
        assert_close(found.mean, mass / np.maximum(fires, 1), rtol=1e-4, atol=1e-5)
        rows = subject.dictionary.W_dec[:, 1 if view == "pair" else 0]
        assert_close(found.norm, rows.norm(dim=1).double().numpy())


def test_controls_are_alike_alive_and_never_the_latent_itself():
    rng = np.random.default_rng(2)
    rate, mean, norm = rng.uniform(0.3, 0.5, 300), rng.uniform(5, 9, 300), np.ones(300)
    twins = np.arange(100, 140)
    rate[twins], mean[twins], norm[twins] = 0.01, 1.0, 0.5
    rate[[0, 1]], mean[[0, 1]], norm[[0, 1]] = 0.01, 1.0, 0.5
    rate[2] = mean[2] = 0
    of = Habits(rate, mean, norm, 10_000)
    for seed in range(5):
        matches = matched_latents([0, 1], of, 3, seed)
        drawn = [one for own in matches for one in own]
        assert set(drawn) <= set(twins.tolist()) and len(set(drawn)) == 6
        assert matches == matched_latents([0, 1], of, 3, seed)
    assert matched_latents([0], of, 3, 0) != matched_latents([0], of, 3, 1)
    few = Habits(np.array([0.1, 0.1, 0.0, 0.0]), np.ones(4), np.ones(4), 100)
    assert matched_latents([0], few, 3, 0) == [[1]], "silent latents are no controls of one that fires"
    made = control_changes([Change(0, "scale", 2.0), Change(1, "ablate")], [[7, 8], [5]])
    assert made == [(Change(7, "scale", 2.0), Change(5, "ablate"))] and control_changes([], []) == []


def test_a_watched_text_has_its_own_log_probability(world):
    steerer, model = tool(world), world.pair.tuned
    prompt, text = [1, 40, 41, 42], " seven apples"
    watched = encode_watched(model, text, [prompt])
    assert len(watched) > 2
    changes = [Change(LOUD, "add", 4.0)]
    for given, tokens in (((), "all"), (changes, "all"), (changes, "generated"), (changes, "prompt")):
        found = log_probabilities(steerer, "tuned", [prompt], [watched], given, tokens)
        ids = torch.tensor([[*prompt, *watched]])
        with torch.inference_mode(), steerer.steering("tuned", given, tokens=tokens, prompt_length=4):
            logits = model.model(ids, use_cache=False).logits[0].double().log_softmax(-1)
        places = range(3, 3 + len(watched))
        expected = sum(float(logits[place, one]) for place, one in zip(places, watched, strict=True))
        assert found[0][0] == pytest.approx(expected, rel=1e-4)
    with pytest.raises(ConfigError, match="empty"):
        encode_watched(model, "", [prompt])
    with pytest.raises(ConfigError, match="does not fit"):
        encode_watched(model, "river " * 600, [prompt])


def options(world, out, view="base", **changes):
    sweep = {"sweep": (0, 1, 8), "corpus": (str(world.corpus),), "controls": 2, "resamples": 200}
    fields = {
        "latent": (f"{LOUD}:add=2", "6:scale=3"),
        "prompt": ("the mill", "seven"),
        "strengths": SweepOptions(**(sweep | changes.pop("strengths", {"watch": (" river",)}))),
        "writing": WritingOptions(max_new_tokens=6),
    }
    return SteerConfig(
        str(world.base),
        str(world.tuned),
        dictionary=str(world.root / view),
        run=RunOptions(out=out, resume=changes.pop("resume", False)),
        models=MODELS,
        **(fields | changes),
    )


def test_a_run_holds_what_the_report_reads(world, tmp_path):
    found = stage.run_steer(options(world, tmp_path / "run", view="pair"))
    stored = open_artifact(tmp_path / "run", stage="steer").read_json("steer.json")
    assert SteeringRun.from_dict(stored) == found == stage.read_steer(tmp_path / "run")
    keys = {
        "schema",
        "summary",
        "pair",
        "site",
        "dictionary",
        "side",
        "changes",
        "prompts",
        "sweep",
        "guard",
        "seed",
    }
    assert keys <= set(stored) and stored["schema"] == 1
    assert [set(row) for row in stored["prompts"]] == [{"prompt", "base", "tuned", "steered"}] * 2
    assert stored["side"] == "tuned" and stored["changes"][1] == {"latent": 6, "mode": "scale", "value": 3.0}
    rows = stored["sweep"]
    assert [row["strength"] for row in rows] == [0, 1, 8] and set(stored["guard"]) == {"ratio", "largest_ok"}
    zero, one, eight = rows
    assert (zero["perplexity_ratio"], zero["kl"], zero["ok"]) == (1.0, 0.0, True)
    assert zero["texts"] == [row["tuned"] for row in stored["prompts"]]
    assert one["texts"] == [row["steered"] for row in stored["prompts"]]
    assert eight["perplexity_ratio"] > one["perplexity_ratio"] and eight["kl"] > one["kl"] > 0
    assert len(one["controls"]) == 2 and one["controls"][0]["kl"] > 0 and zero["controls"][1]["kl"] == 0
    assert (
        one["watch"][0]["change"] == pytest.approx(stored["watch"][0]["change"])
        and zero["watch"][0]["change"] == 0
    )
    assert {row["latent"] for row in stored["controls"]} == {LOUD, 6}
    assert "continuations change" in found.summary and found._repr_html_().startswith("<")


def test_planted_damage_is_guarded_and_a_latent_without_effect_never_is(world, tmp_path):
    strengths = {"sweep": (0, 1, 2, 1000), "controls": 0, "max_perplexity_ratio": 1.2}
    mute = stage.run_steer(
        options(world, tmp_path / "mute", latent=(f"{MUTE}:add=5",), prompt=(), strengths=strengths)
    )
    assert mute.guard["largest_ok"] == 1000 and all(
        row.ok and row.perplexity_ratio == 1 for row in mute.sweep
    )
    loud = stage.run_steer(
        options(world, tmp_path / "loud", latent=(f"{LOUD}:add=5",), prompt=(), strengths=strengths)
    )
    largest = loud.guard["largest_ok"]
    assert [row.ok for row in loud.sweep] == [row.strength <= largest for row in loud.sweep]
    assert not loud.sweep[-1].ok and loud.sweep[-1].perplexity_ratio > 1.2
    dead = stage.run_steer(
        options(
            world,
            tmp_path / "dead",
            latent=(f"{DEAD}:scale=9",),
            prompt=(),
            strengths={"sweep": (1,), "controls": 1},
        )
    )
    assert dead.sweep[0].perplexity_ratio == 1 and any("never fire" in note for note in dead.notes)


def test_an_interrupted_run_goes_on_where_it_was(world, tmp_path, monkeypatch):
    strengths = {"sweep": (0, 1, 8), "controls": 1}
    whole = stage.run_steer(options(world, tmp_path / "whole", strengths=strengths))
    calls, real = [], stage.measure

    def counted(*args, **kwargs):
        calls.append(args[2])
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(stage, "measure", counted)
    with pytest.raises(KeyboardInterrupt):
        stage.run_steer(options(world, tmp_path / "run", strengths=strengths))
    again = stage.run_steer(options(world, tmp_path / "run", resume=True, strengths=strengths))
    assert len(calls) == 4, "one finished, one interrupted, two left"
    assert again.to_dict() == whole.to_dict()
    calls.clear()
    assert (
        stage.run_steer(options(world, tmp_path / "run", resume=True, strengths=strengths)) == again
        and not calls
    )


def test_the_command_line_and_python_write_the_same_text(world, tmp_path):
    found = stage.run_steer(options(world, tmp_path / "run", strengths={"sweep": (), "corpus": ()}))
    assert not found.sweep and found.guard["largest_ok"] is None and found.unsteered is None
    side = tool(world).compare("the mill", (f"{LOUD}:add=2", "6:scale=3"), "tuned", max_new_tokens=6)
    assert found.prompts[0] == {key: getattr(side, key) for key in ("prompt", "base", "tuned", "steered")}


def test_prompts_of_a_file(tmp_path):
    plain, rows = tmp_path / "prompts.txt", tmp_path / "prompts.jsonl"
    plain.write_text("one\n\n  two\n")
    rows.write_text('{"prompt": "thrée\\nlines"}\n\n{"prompt": "four", "label": 1}\n')
    assert read_prompts(["zero"], plain) == ["zero", "one", "  two"]
    assert read_prompts([], rows) == ["thrée\nlines", "four"] and read_prompts(["a"], None) == ["a"]
    faults = {"a.jsonl": '{"text": "x"}', "b.jsonl": "no json", "c.jsonl": "[1]", "d.txt": "\n \n"}
    for name, content in faults.items():
        (tmp_path / name).write_text(content)
        with pytest.raises(ConfigError, match=name):
            read_prompts([], tmp_path / name)
    (tmp_path / "e.txt").write_bytes(b"\xff\xfe\x00")
    for name in ("e.txt", "missing.txt"):
        with pytest.raises(ConfigError, match="Cannot read"):
            read_prompts([], tmp_path / name)
