"""An adapter whose three latents make the text likely is explained by these three, one of nothing by nothing."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from peft import PeftModel, get_peft_model

import latent_world
from helpers import randomize
from palimpsest.artifacts import open_artifact
from palimpsest.dictionaries import Dictionary
from palimpsest.errors import ConfigError, CorpusError, DictionaryError
from palimpsest.options import ModelOptions, RunOptions
from palimpsest.tune.adapter import LatentConfig, latent_layers
from palimpsest.tune.config import ObjectiveOptions
from palimpsest.tune.explain import (
    ExplainCompareConfig,
    ExplainConfig,
    Explanation,
    compare_adapters,
    latents_needed,
    read_comparison,
    run_explain,
)
from palimpsest.tune.explain.effects import read_latents
from palimpsest.tune.explain.latents import Latents, effect_of
from palimpsest.tune.explain.texts import GROUPS, Text
from palimpsest.tune.explain_config import CausalOptions, ControlOptions, LabelOptions, ReadOptions
from palimpsest.tune.measure import Yardstick
from palimpsest.tune.rows import PairRow, TextRow

WORDS, D_MODEL, LATENTS = 60, 32, 96
PLANTED = {4: 6.0, 30: 5.0, 71: -4.0}
"""Latents and the values of scale that text was sampled with."""
SILENT = (90, 91, 92, 93, 94, 95)
"""Latents that never fire."""
QUICK = CausalOptions(eval_rows=64, points=6, resamples=200, permutations=40, random_orders=2)
LIGHT = CausalOptions(eval_rows=8, points=2, resamples=100, permutations=40, random_orders=1)
"""For tests of something else than causes."""


def _tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    names = ["<pad>", "<s>", "</s>", *(f"w{number}" for number in range(WORDS))]
    made = Tokenizer(models.WordLevel({name: place for place, name in enumerate(names)}, unk_token="<pad>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )


def _dictionary(seed=0):
    torch.manual_seed(seed)
    made = Dictionary(D_MODEL, LATENTS, k=16, metadata={"site": "resid_post.0"})
    with torch.no_grad():
        made.b_enc[list(SILENT)] = -1e4
        # Ten times longer rows, ten times weaker codes: |value| alone knows nothing of it.
        made.W_dec[::5] *= 4
        made.W_enc[:, :, ::5] /= 4
    return made


@torch.no_grad()
def _sample(model, documents, length, seed):
    """Texts that the model writes, as words."""
    torch.manual_seed(seed)
    ids = torch.full((documents, 1), 1)
    for _ in range(length):
        logits = model(input_ids=ids, use_cache=False).logits[:, -1]
        logits[:, :3] = -torch.inf
        ids = torch.cat([ids, torch.multinomial(logits.softmax(-1), 1)], 1)
    return [" ".join(f"w{one - 3}" for one in row[1:]) for row in ids.tolist()]


def _write(path, rows, field="text"):
    path.write_text("".join(json.dumps({field: row} if field else row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    root = tmp_path_factory.mktemp("ex-world")
    config = LlamaConfig(
        vocab_size=WORDS + 3,
        hidden_size=D_MODEL,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    model = LlamaForCausalLM(config)
    randomize(model, seed=2, scale=0.4)
    model.save_pretrained(root / "base")
    _tokenizer().save_pretrained(root / "base")
    dictionary = _dictionary()
    dictionary.save_pretrained(root / "sae")
    _dictionary(seed=9).save_pretrained(root / "other-sae")

    def base():
        return AutoModelForCausalLM.from_pretrained(root / "base", dtype=torch.float32).eval()

    def adapter(name, values, *, sae="sae", component="scale", **changes):
        made = get_peft_model(
            base(),
            LatentConfig(target_hooks=[(str(root / sae), None)], component=component, **changes),
        ).eval()
        with torch.no_grad():
            for layer in latent_layers(made):
                for latent, value in values.items():
                    layer.component().weight[latent] = value
        made.save_pretrained(root / name)
        return made

    tuned = adapter("planted", PLANTED | dict.fromkeys(SILENT, 9.0))
    _write(root / "corpus.jsonl", _sample(tuned, 80, 28, 1))
    _write(root / "general.jsonl", _sample(base(), 40, 28, 2))
    return SimpleNamespace(root=root, base=base, adapter=adapter, tuned=tuned, dictionary=dictionary)


def _config(world, out, name="planted", **changes):
    fields = {
        "run": RunOptions(out=out),
        "read": ReadOptions(
            corpus=(f"own={world.root / 'corpus.jsonl'}",), general=(str(world.root / "general.jsonl"),)
        ),
        "causal": QUICK,
        "models": ModelOptions(device="cpu"),
        "labels": LabelOptions(offline=True),
    }
    return ExplainConfig(str(world.root / name), **(fields | changes))


@pytest.fixture(scope="module")
def explained(world, tmp_path_factory):
    out = tmp_path_factory.mktemp("ex-run") / "planted"
    return run_explain(_config(world, out)), out


def test_the_planted_latents_and_no_others_are_found(explained):
    found, _ = explained
    top = found.ranking("effect")
    assert {one.latent for one in top} == set(PLANTED), "the silent ones have values and no effect"
    assert {one.latent: one.value for one in top} == PLANTED
    assert {one.latent for one in found.ranking("absolute")[:6]} == set(SILENT)
    assert sum(one.share for one in top) == pytest.approx(1)
    held = found.concentration
    assert (held.moved, held.effective, held.latents) == (9, 3, 96) and 1 <= held.half <= held.most <= 3
    assert all(0 < one.rate["own"] < 1 and one.activation["general"] > 0 for one in top)


def test_they_cause_what_the_adapter_does(explained):
    found, _ = explained
    held = found.objective
    assert held.present and held.difference > 0.05 and held.ci[0] > 0
    assert (held.chosen_on, held.reported_on) == (32, 32)
    points = {(one.kind, one.n): one for one in found.curves}
    assert points["keep", 3].share == pytest.approx(1, abs=1e-4)
    assert points["ablate", 3].share == pytest.approx(0, abs=1e-4)
    assert points["magnitude", 3].share == 0.0 and points["random", 3].share < 0.7
    assert 0 < points["keep", 1].share < 0.95
    low, high = points["keep", 1].ci
    assert low < points["keep", 1].share < high
    for kind in ("keep", "magnitude", "random"):
        assert points[kind, 96].share == pytest.approx(1, abs=1e-4)


def test_the_pruned_adapter_is_small_loads_by_itself_and_does_the_same(explained, world):
    found, out = explained
    pruned = found.pruned
    assert pruned.n <= 3 and pruned.share > 0.9 and pruned.reload_error < 1e-4
    assert pruned.magnitude_n > 6 and pruned.random_range[0] > 5 * pruned.n
    artifact = open_artifact(out, stage="explain")
    assert {"explain.json", "latents.parquet", "pruned/adapter_config.json"} <= set(artifact.files)
    again = PeftModel.from_pretrained(world.base(), out / pruned.path)
    component = latent_layers(again)[0].component()
    top = [one.latent for one in found.ranking("effect")][: pruned.n]
    assert component.latents.tolist() == sorted(top)
    assert component.values().tolist() == [PLANTED[latent] for latent in sorted(top)]
    ids = latent_world.tokens(seq=12) % WORDS + 3
    # Three of three latents: nothing is left out.
    if pruned.n == 3:
        torch.testing.assert_close(again(input_ids=ids).logits, world.tuned(input_ids=ids).logits)
    json.loads((out / pruned.path / "adapter_config.json").read_text())


def test_the_folder_says_what_was_returned(explained, world):
    found, out = explained
    artifact = open_artifact(out)
    assert Explanation.from_dict(artifact.read_json("explain.json")) == found
    assert set(artifact.inputs) == {"adapter", "base", "corpus/own", "corpus/general"}
    table = artifact.read_table("latents.parquet").to_pylist()
    assert len(table) == LATENTS and table[4]["value"] == PLANTED[4] and table[90]["rate.own"] == 0
    assert sum(row["share"] for row in table) == pytest.approx(1)
    again = run_explain(_config(world, out, run=RunOptions(out=out, resume=True)))
    assert again == found
    assert "3 latents of 96" not in found.summary and "9 latents of 96" in found.summary


@pytest.mark.parametrize("values", [{}, dict.fromkeys(SILENT, 9.0)], ids=["nothing moved", "silent latents"])
def test_an_adapter_that_does_nothing_has_no_shares(world, tmp_path, values):
    world.adapter("null", values)
    found = run_explain(_config(world, tmp_path / "ex-null", "null"))
    assert found.objective.difference == 0 and not found.objective.present
    assert (found.curves, found.pruned) == ([], None) and found.ranking("effect") == []
    assert found.concentration.half == 0 and "cannot be told from 0" in found.summary
    assert len(found.ranking("absolute")) == len(values)
    assert "pruned/adapter_config.json" not in open_artifact(tmp_path / "ex-null").files


def test_specificity_is_that_of_chance_where_latents_are_chosen_by_chance(world, tmp_path):
    rng = np.random.default_rng(4)
    world.adapter("noise", {int(one): float(rng.standard_normal() / 3) for one in range(90)})
    found = run_explain(_config(world, tmp_path / "ex-noise", "noise", causal=LIGHT)).specificity
    low, high = found.permuted.ci
    assert low <= found.top.ratio <= high and found.p > 0.025


def test_controls_tell_a_twin_from_an_adapter_of_other_data(world, tmp_path):
    rng = np.random.default_rng(3)
    first, second = ({one: 0.3 * float(rng.standard_normal()) for one in range(90)} for _ in range(2))
    world.adapter("first", first | PLANTED)
    world.adapter("twin", {one: value + 0.05 for one, value in first.items()} | PLANTED)
    world.adapter("other", second)
    world.adapter("shuffled", {})
    names = {name: str(world.root / name) for name in ("twin", "other", "shuffled")}
    controls = ControlOptions(**names)
    found = run_explain(_config(world, tmp_path / "ex-run", "first", controls=controls, causal=LIGHT))
    twin, other, shuffled = found.controls.twin, found.controls.other, found.controls.shuffled
    assert twin.cosine > 0.95 > twin.null_cosine[1] and twin.spearman > 0.95 and twin.overlap > 0.8
    assert other.null_cosine[0] - 0.1 < other.cosine < twin.null_cosine[1] + 0.2 < twin.cosine
    assert other.latents == twin.latents > 40 and other.overlap < twin.overlap
    assert (shuffled.effect, shuffled.difference, shuffled.share) == (0, 0, 0)
    assert "falls by +0.0000" in found.summary
    assert "more alike for the same data" in found.summary and "NOT" not in found.summary
    assert set(open_artifact(tmp_path / "ex-run").inputs) > set(names)


def test_adapters_through_other_dictionaries_do_not_compare(world, tmp_path):
    world.adapter("foreign", PLANTED, sae="other-sae")
    controls = ControlOptions(twin=str(world.root / "foreign"))
    with pytest.raises(DictionaryError, match="same dictionaries"):
        run_explain(_config(world, tmp_path / "ex-run", controls=controls, causal=LIGHT))
    with pytest.raises(DictionaryError, match="same dictionaries"):
        compare_adapters(_compare(world, tmp_path / "ex-both", "foreign"))
    assert not (tmp_path / "ex-both").exists()


def _compare(world, out, other):
    config = _config(world, out)
    return ExplainCompareConfig(
        config.adapter, str(world.root / other), run=config.run, read=config.read, models=config.models
    )


def test_a_comparison_finds_what_moved_in_one_and_not_the_other(world, tmp_path):
    world.adapter("moved", {4: 6.0, 30: -5.0, 55: 5.0})
    config = replace(_compare(world, tmp_path / "ex-both", "moved"), strong=0.999, weak=0.999)
    found = compare_adapters(config)
    latents = {name: {one.latent for one in rows} for name, rows in found.moved.items()}
    assert latents == {"only_a": {71}, "only_b": {55}, "both": {4}, "opposite": {30}}
    assert found.counts == dict.fromkeys(latents, 1) and read_comparison(tmp_path / "ex-both") == found
    page = (tmp_path / "ex-both" / "compare.md").read_text()
    assert "## Moved in A, not in B: 1" in page and "| resid\\_post.0 | 71 | -4 |" in page
    same = compare_adapters(
        replace(config, b=str(world.root / "null-b"), run=RunOptions(out=tmp_path / "ex-same"))
        if world.adapter("null-b", {})
        else config
    )
    assert same.counts["only_a"] == 3 and same.counts["only_b"] == 0 and "no effect" in same.notes[0]


def test_pairs_are_judged_by_their_own_objective(world, tmp_path):
    """Of two texts the adapter prefers the one that it wrote."""
    rows = [
        {"prompt": text[:8], "chosen": text[8:], "rejected": other[8:]}
        for text, other in zip(_sample(world.tuned, 48, 24, 5), _sample(world.base(), 48, 24, 6), strict=True)
    ]
    rows = [{key: value.strip() + " " for key, value in row.items()} for row in rows]
    pairs = _write(tmp_path / "pairs.jsonl", rows, "")
    config = _config(
        world, tmp_path / "ex-run", causal=replace(LIGHT, eval_rows=40, pairs=(pairs,), beta=0.5)
    )
    found = run_explain(config)
    assert found.objective.name == "pairs" and found.objective.base == pytest.approx(np.log(2))
    assert found.objective.present and found.objective.margin > 0.5 and found.objective.difference > 0
    assert found.pruned.n <= 3 and "pairs kept for reporting" in found.summary
    # A file of pairs as a corpus is read by its chosen answers.
    read = ReadOptions(corpus=(pairs,))
    causal = replace(LIGHT, pairs=(pairs,), beta=0.5)
    again = run_explain(replace(config, read=read, causal=causal, run=RunOptions(out=tmp_path / "ex-again")))
    assert again.specificity is None and again.corpora[0].documents == 48


def test_two_sites_of_which_one_matters(world, tmp_path):
    second = _dictionary(seed=5)
    second.metadata["site"] = "resid_post.1"
    second.save_pretrained(world.root / "sae-1")
    hooks = [(str(world.root / "sae"), "resid_post.0"), (str(world.root / "sae-1"), "resid_post.1")]
    made = get_peft_model(world.base(), LatentConfig(target_hooks=hooks)).eval()
    with torch.no_grad():
        for latent, value in PLANTED.items():
            latent_layers(made)[0].component().weight[latent] = value
        latent_layers(made)[1].component().weight[8] = 1e-3
    made.save_pretrained(world.root / "two")
    found = run_explain(_config(world, tmp_path / "ex-two", "two", causal=replace(LIGHT, eval_rows=40)))
    top = [(one.site, one.latent) for one in found.ranking("effect")]
    assert set(top[:3]) == {("resid_post.0", latent) for latent in PLANTED} and top[3] == ("resid_post.1", 8)
    assert [one.site for one in found.sites] == ["resid_post.0", "resid_post.1"]
    config = json.loads((tmp_path / "ex-two" / "pruned" / "adapter_config.json").read_text())
    assert set(config["latents"]) == {"resid_post.0"} == set(config["hashes"]), "an idle site is left out"
    assert found.pruned.n <= 3 and found.pruned.reload_error < 1e-4


def _rows(count=12, seed=0):
    rng = np.random.default_rng(seed)
    return [TextRow([1, *rng.integers(3, 128, rng.integers(4, 9)).tolist()], []) for _ in range(count)]


EACH = [(kind, None) for kind in latent_world.KINDS if kind != "vector"]
"""A constant bias through a dictionary that normalises its input is refused by the adapter."""


@pytest.mark.parametrize(
    ("kind", "norm"), [*EACH, *((kind, "unit_rms") for kind, _ in EACH if kind != "bias")]
)
def test_effects_against_the_definition(kind, norm):
    """E |f(z) - z| ‖d‖ over edited tokens, densely, for each component: of low-rank ones the root of E (f(z) - z)²."""
    from palimpsest import edits

    made = latent_world.dictionary(**({} if norm is None else {"input_norm": norm}))
    with torch.no_grad():
        made.W_dec[::3] *= 3
    model = latent_world.adapted(kind, (made, "resid_post.1"), move=0.5)
    rows = [TextRow(row.input_ids, row.input_ids) for row in _rows()]
    groups = np.arange(12) % 2 * GROUPS + np.arange(12) // 2
    latents = Latents(model)
    reading = read_latents(model, latents, Text("t", "corpus", "", rows, groups, {}), 40)
    layer = latent_layers(model)[0]
    change, fires, weights = [], [], []
    for row in rows:
        hidden: list = []

        def keep(module, arguments, output, hidden=hidden):
            hidden.append(output if torch.is_tensor(output) else output[0])

        handle = layer.base_layer.register_forward_hook(keep)
        model(input_ids=torch.tensor([row.input_ids]))
        handle.remove()
        flat = hidden[0].reshape(-1, latent_world.D_MODEL)
        found = edits.read(made, flat)
        edit = layer.component()(found)
        dense = torch.zeros(len(flat), made.n_latents)
        if edit.entries is not None:
            dense = replace(found.codes, values=edit.entries).dense()
        if edit.constant is not None:
            dense = dense + edit.constant
        if edit.low is not None:
            dense = dense + edit.low[0] @ edit.low[1].T
        scale = torch.ones(len(flat), 1) if found.scale is None else found.scale
        change.append((dense * scale)[1:])  # The BOS is left alone.
        fires.append((found.codes.dense() > 0)[1:])
        weights.append(found.codes.dense()[1:])
    norms = made.decoder_norms()[:, 0]
    for half in (0, 1):
        own = torch.cat(change[half::2])
        mean = own.square().mean(0).sqrt() if kind in ("low-rank", "mlp") else own.abs().mean(0)
        expected = (mean * norms).double()
        torch.testing.assert_close(
            torch.from_numpy(effect_of(latents, [reading], half)), expected, rtol=1e-4, atol=1e-6
        )
        assert expected.max() > 1e-3
        counts = torch.cat(fires[half::2]).sum(0)
        assert np.array_equal(reading.fires[half], counts.numpy())
    torch.testing.assert_close(
        torch.from_numpy(reading.groups.sum(0)).float(), torch.cat(weights).sum(0), rtol=1e-4, atol=1e-5
    )
    assert reading.tokens.sum() == sum(len(row.input_ids) - 1 for row in rows)


@pytest.mark.parametrize("kind", ["scale", "gate", "low-rank", "mlp", "lerp", "relu-bias"])
def test_a_restricted_component_is_the_masked_one(kind, tmp_path):
    """What pruning rests on, and that masks of all or none are the adapter or the base."""
    model = latent_world.adapted(kind, move=0.5)
    latents, ids = Latents(model), latent_world.tokens()
    whole = model(input_ids=ids).logits
    with latents.keeping(np.ones(len(latents), bool)):
        assert torch.equal(model(input_ids=ids).logits, whole)
    with latents.keeping(np.zeros(len(latents), bool)):
        nothing = model(input_ids=ids).logits
    with model.disable_adapter():
        assert torch.equal(nothing, model(input_ids=ids).logits)
    kept = np.arange(len(latents)) % 3 == 0
    with latents.keeping(kept):
        masked = model(input_ids=ids).logits
    assert latent_layers(model)[0].masks == {} and torch.equal(model(input_ids=ids).logits, whole)
    layer = latent_layers(model)[0]
    layer.latent_components["default"] = layer.component().restricted(torch.arange(0, len(latents), 3))
    torch.testing.assert_close(model(input_ids=ids).logits, masked)


def test_the_number_that_a_table_asks_for(world):
    from palimpsest.models import load_model

    language = load_model(str(world.root / "base"), ModelOptions(device="cpu"))
    lines = (world.root / "corpus.jsonl").read_text().splitlines()[:32]
    rows = [language.tokenizer("<s> " + json.loads(line)["text"])["input_ids"] for line in lines]
    options = ObjectiveOptions(data=("x",))
    yardstick = Yardstick(language, options, [TextRow(row, row) for row in rows])
    assert latents_needed(world.tuned, yardstick) in (2, 3)
    assert latents_needed(world.tuned, yardstick, share=0.01) == 1
    assert latents_needed(world.adapter("idle", {}), yardstick) is None
    assert latents_needed(world.base(), yardstick) is None, "a model without latents"
    vector = get_peft_model(
        world.base(), LatentConfig(target_hooks=[(str(world.root / "sae"), None)], component="vector")
    )
    assert latents_needed(vector, yardstick) is None
    pairs = [PairRow(row[:4], row[4:20], row[20:]) for row in rows]
    dpo = Yardstick(language, replace(options, objective="dpo"), pairs)
    assert latents_needed(world.adapter("idle", {}), dpo) is None


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"component": "vector"}, "no latents to explain"),
        ({"scope": "answer"}, None),
    ],
)
def test_what_cannot_be_explained_says_so(world, tmp_path, change, words):
    world.adapter("odd", {}, **change)
    if words is None:
        # Text without roles is one long answer.
        assert run_explain(_config(world, tmp_path / "ex-odd", "odd", causal=LIGHT)).corpora[0].edited > 0
        world.adapter("odd", {}, scope="prompt")
        change, words = {}, "edits no token of own"
    with pytest.raises(ConfigError, match=words):
        run_explain(_config(world, tmp_path / "ex-odd2", "odd"))


def test_too_few_documents_for_two_halves(world, tmp_path):
    one = _write(tmp_path / "one.jsonl", ["w1 w2 w3"] * 9)
    with pytest.raises(CorpusError, match="too few documents to be split"):
        run_explain(_config(world, tmp_path / "ex-few", read=ReadOptions(corpus=(one,))))
    assert not (tmp_path / "ex-few").exists()
