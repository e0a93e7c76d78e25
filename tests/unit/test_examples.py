"""Examples of every latent against brute force: dense codes of each document, one at a time."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import pair_fixture
from palimpsest.corpus import Corpus
from palimpsest.dictionaries import Dictionary
from palimpsest.errors import ArtifactError, ConfigError, CorpusError, DictionaryError, NumericsError
from palimpsest.interpret.examples import ExamplesConfig, collect, run_examples, windows
from palimpsest.interpret.examples.cofiring import MIN_JOINT
from palimpsest.interpret.examples.tallies import LOWEST
from palimpsest.interpret.examples.vocabulary import token_texts
from palimpsest.interpret.subject import larger, open_subject, subject_of
from palimpsest.interpret.token_odds import EVENTS, LEAST_Z, MOST, PRIOR
from palimpsest.latents import LatentIndex
from palimpsest.latents.schema import EXAMPLES, LATENTS, ROLES
from palimpsest.models import SIDES, load_pair
from palimpsest.options import CorpusOptions, ModelOptions, RunOptions


def near(found, expected, rtol=1e-5, atol=1e-6):
    # The message of `assert_allclose` costs more than the comparison, thousands of times.
    found, expected = np.asarray(found, float), np.asarray(expected, float)
    if found.shape != expected.shape or not np.allclose(found, expected, rtol=rtol, atol=atol):
        np.testing.assert_allclose(found, expected, rtol=rtol, atol=atol)


SITE, N, TOPS, BINS, PER_BIN, BEFORE, AFTER = "resid_post.0", 48, 5, 3, 2, 6, 4
WORDS = (
    "river",
    "mill",
    "counts",
    "sacks",
    "flour",
    "seven",
    "apples",
    "12",
    "30",
    "naïve",
    "日本",
    "</s>",
    "🙂",
)
HOSTILE = "</script><img src=x onerror=alert(1)> \u202eevil\u202c \x1b[31m \x00 {{ 7*7 }}"


def write_documents(path, seed, documents):
    """Documents of very different lengths, with copies, one token alone, and hostile text."""
    rng = np.random.default_rng(seed)
    rows = [" ".join(rng.choice(WORDS, n)) for n in rng.integers(1, 40, documents)]
    rows += ["7", HOSTILE, rows[0], rows[1], "the same in both corpora"]
    path.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    return str(path)


def make_dictionary(folder, view="base", activation="topk", seed=0, **extra):
    torch.manual_seed(seed)
    k = {"topk": 6, "batch_topk": 6.0}.get(activation)
    made = Dictionary(
        32,
        N,
        activation=activation,
        k=k,
        models=2 if view == "pair" else 1,
        view=view,
        metadata={"site": SITE},
        **extra,
    )
    with torch.no_grad():
        made.W_dec.mul_(1 + torch.rand(N, made.models, 1))
        made.W_enc.add_(0.1 * torch.randn(made.W_enc.shape))
        made.b_dec.add_(0.1 * torch.randn(made.b_dec.shape))
        if activation == "relu":
            made.b_enc.sub_(0.6)
            # One latent that never fires.
            made.b_enc[3] = -1000.0
        if activation == "batch_topk":
            made.threshold.fill_(0.3)
    made.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def world(tmp_path_factory, tiny_llama, tiny_tokenizer):
    root = tmp_path_factory.mktemp("examples")
    base = tiny_llama()
    tuned = pair_fixture.fine_tune(base, root / "tuned", tiny_tokenizer, scale=0.08)
    corpora = {
        name: write_documents(root / f"{name}.jsonl", seed, 18) for seed, name in enumerate(("one", "two"))
    }
    dictionaries = {
        "sae": make_dictionary(root / "sae"),
        "relu": make_dictionary(root / "relu", activation="relu", seed=1),
        "normed": make_dictionary(root / "normed", "tuned", seed=2, input_norm="layer_norm"),
        "pair": make_dictionary(root / "pair", "pair", "batch_topk", seed=3),
        "diff": make_dictionary(root / "diff", "diff", seed=4),
    }
    made = SimpleNamespace(root=root, base=str(base), tuned=str(tuned), corpora=corpora, found={}, dense={})
    made.dictionaries, made.read = dictionaries, []
    made.pair = load_pair(base, tuned, ModelOptions(device="cpu"))
    return made


def config_of(world, out, kind="sae", **changes):
    run = {key: changes.pop(key) for key in ("resume", "overwrite", "seed") if key in changes}
    models = {key: changes.pop(key) for key in ("one_at_a_time", "tokens_per_batch") if key in changes}
    fields = {
        "tuned": world.tuned,
        "dictionary": world.dictionaries.get(kind, kind),
        "corpus": tuple(f"{name}={path}" for name, path in world.corpora.items()),
        "run": RunOptions(out=out, **run),
        "tops": TOPS,
        "bins": BINS,
        "per_bin": PER_BIN,
        "before": BEFORE,
        "after": AFTER,
        "models": ModelOptions(device="cpu", **({"tokens_per_batch": 256} | models)),
    }
    return ExamplesConfig(world.base, **(fields | changes))


def made(world, kind="sae"):
    """A finished run of one kind of dictionary; made once."""
    if kind not in world.found:
        tuned = None if kind == "lone" else world.tuned
        config = config_of(world, world.root / f"run-{kind}", "relu" if kind == "lone" else kind, tuned=tuned)
        world.found[kind] = LatentIndex.open(run_examples(config).path)
    return world.found[kind]


def brute(world, kind):
    """Every document with its dense codes `[tokens, latents]` of each signal, zero where nothing is measured."""
    if kind not in world.dense:
        world.dense[kind] = dense_codes(world, kind)
    return world.dense[kind]


def dense_codes(world, kind):
    name = "relu" if kind == "lone" else kind
    subject = open_subject(
        world.base, world.tuned, world.dictionaries[name], None, ModelOptions(device="cpu")
    )
    encode, found = subject.dictionary.encode, []
    for corpus, document, base, tuned in read_alone(world):
        if kind == "diff":
            codes = {"value": encode(tuned - base)}
        elif kind == "pair":
            codes = {"value": encode(torch.stack([base, tuned], 1))}
            codes |= {"base": encode(torch.stack([base, base], 1))}
            codes |= {"tuned": encode(torch.stack([tuned, tuned], 1))}
        else:
            codes = {"base": encode(base)} | ({} if kind == "lone" else {"tuned": encode(tuned)})
        dense = {signal: one.dense().detach().numpy() for signal, one in codes.items()}
        if "value" not in dense:
            dense["value"] = np.maximum.reduce(list(dense.values()))
        measured = ~document.special
        dense = {signal: np.where(measured[:, None], one, 0) for signal, one in dense.items()}
        found.append(
            SimpleNamespace(
                corpus=corpus, index=document.index, ids=document.token_ids, measured=measured, **dense
            )
        )
    return found


def read_alone(world):
    """Both models' activations of every document, each in a forward pass of its own; made once."""
    if not world.read:
        for corpus, path in world.corpora.items():
            for document in Corpus(path, world.pair.tokenizer, name=corpus).documents():
                ids = torch.from_numpy(document.token_ids).long()[None]
                acts = [world.pair.side(side).read(ids, [SITE]).acts[SITE][0].float() for side in SIDES]
                world.read.append((corpus, document, *acts))
    return world.read


def originals(documents):
    """The documents that are no copy of an earlier one."""
    seen, found = set(), []
    for document in documents:
        if document.ids.tobytes() not in seen:
            seen.add(document.ids.tobytes())
            found.append(document)
    return found


KINDS = ("sae", "relu", "lone", "normed", "pair", "diff")


@pytest.mark.parametrize("kind", KINDS)
def test_counts_rates_and_histograms(world, kind):
    index, documents = made(world, kind), brute(world, kind)
    tokens = sum(int(one.measured.sum()) for one in documents)
    assert index.about["tokens"] == tokens
    signals = [name for name in ("value", "base", "tuned") if hasattr(documents[0], name)]
    whole = {name: np.concatenate([getattr(one, name) for one in documents]) for name in signals}
    value = whole["value"]
    corpus = np.concatenate([[one.corpus] * len(one.ids) for one in documents])
    measured = np.concatenate([one.measured for one in documents])
    assert index.latents.tolist() == np.flatnonzero((value > 0).any(0)).tolist()
    for latent in index.latents:
        row, own = index.row(int(latent)), value[:, latent]
        assert row["fires"] == int((own > 0).sum())
        near(row["rate"], row["fires"] / tokens)
        near(row["mean_value"], float(own[own > 0].mean()), rtol=1e-4)
        near(row["max_value"], float(own.max()), rtol=1e-4)
        for signal in ("base", "tuned"):
            if signal not in whole:
                assert row[f"rate_{signal}"] is None and row[f"histogram_{signal}"] is None
                continue
            seen = whole[signal][:, latent]
            near(row[f"rate_{signal}"], int((seen > 0).sum()) / tokens)
            assert sum(row[f"histogram_{signal}"]) == (seen > 0).sum()
            if (seen > 0).any():
                near(row[f"mean_{signal}"], float(seen[seen > 0].mean()), rtol=1e-4)
            else:
                assert row[f"mean_{signal}"] is None and row[f"max_{signal}"] == 0
        for name in world.corpora:
            fires = int((own[corpus == name] > 0).sum())
            near(row[f"rate[{name}]"], fires / int(measured[corpus == name].sum()))
        bins = np.floor(2 * np.log2(own[own > 0].astype(float))).astype(int)
        bins = np.maximum(bins, LOWEST) - row["histogram_start"]
        expected = np.bincount(bins, minlength=len(row["histogram_value"]))
        assert row["histogram_value"] == expected.tolist()
        assert all(row[f"share[{role}]"] is None for role in ROLES)


@pytest.mark.parametrize("kind", KINDS)
def test_the_strongest_of_each_document(world, kind):
    index, documents = made(world, kind), originals(brute(world, kind))
    for latent in index.latents:
        value = {(one.corpus, one.index): float(one.value[:, latent].max()) for one in documents}
        best = sorted((one for one in value.values() if one > 0), reverse=True)[:TOPS]
        found = index.examples(int(latent), kind=0)
        assert [one.rank for one in found] == list(range(len(best)))
        near([one.value for one in found], best, rtol=1e-4)
        # Documents that begin alike have equal values there: which of them is shown is open.
        assert len({(one.corpus, one.document) for one in found}) == len(found)
        near([value[one.corpus, one.document] for one in found], best, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_windows_and_both_models_beside_each_other(world, kind):
    index = made(world, kind)
    by_place = {(one.corpus, one.index): one for one in brute(world, kind)}
    lengths = set()
    for latent in index.latents:
        for one in index.examples(int(latent)):
            document = by_place[one.corpus, one.document]
            place = one.start + one.peak
            assert one.start == max(0, place - BEFORE)
            window = slice(one.start, place + AFTER + 1)
            assert one.ids == document.ids[window].tolist()
            lengths.add(len(one.ids))
            near(one.value_at, document.value[window, latent].tolist(), rtol=1e-4, atol=1e-5)
            near(one.value, float(document.value[place, latent]), rtol=1e-4)
            for signal in ("base", "tuned"):
                spread, own = getattr(one, f"{signal}_at"), getattr(one, signal)
                if not hasattr(document, signal):
                    assert spread is None and own is None
                    continue
                seen = getattr(document, signal)[window, latent]
                near(spread, seen.tolist(), rtol=1e-4, atol=1e-5)
                near(own, float(seen[one.peak]), rtol=1e-4, atol=1e-5)
    assert min(lengths) < BEFORE + 1 and max(lengths) == BEFORE + 1 + AFTER


@pytest.mark.parametrize("kind", ["sae", "pair"])
def test_bins_split_a_sample_of_the_firings(world, kind):
    index, documents = made(world, kind), originals(brute(world, kind))
    places = {(one.corpus, one.index): one for one in documents}
    weaker = 0
    for latent in index.latents:
        found = [one for one in index.examples(int(latent)) if one.kind]
        firing = sum(bool((one.value[:, latent] > 0).any()) for one in documents)
        assert len(found) == min(BINS * PER_BIN, firing)
        assert len({(one.corpus, one.document) for one in found}) == len(found)
        assert all(one.value > 0 and (one.corpus, one.document) in places for one in found)
        sizes = Counter(one.kind for one in found)
        assert max(sizes.values()) - min(sizes.get(number, 0) for number in range(1, BINS + 1)) <= 1
        strongest = {number: [one.value for one in found if one.kind == number] for number in sizes}
        for number, values in strongest.items():
            assert values == sorted(values, reverse=True)
            assert [one.rank for one in found if one.kind == number] == list(range(len(values)))
            assert all(max(values) <= min(strongest[other]) for other in strongest if other > number)
        weaker += any(
            one.value < places[one.corpus, one.document].value[:, latent].max() * 0.99 for one in found
        )
    # The sample is of firings, not of the strongest firing of each document.
    assert weaker > 5


def test_neighbours(world):
    index, documents = made(world), brute(world, "sae")
    fires = (np.concatenate([one.value for one in documents]) > 0).astype(float)
    joint, count = fires.T @ fires, fires.sum(0)
    some = 0
    for latent in index.latents:
        row = index.row(int(latent))
        score = np.where(
            joint[latent] >= MIN_JOINT, joint[latent] / np.sqrt(count[latent] * np.maximum(count, 1)), 0
        )
        score[latent] = 0
        expected = np.sort(score[score > 0])[::-1][:8]
        near(row["neighbour_scores"], expected.tolist(), rtol=1e-5)
        near([score[one] for one in row["neighbours"]], expected.tolist(), rtol=1e-5)
        some += len(expected)
    assert some > 100


@pytest.mark.parametrize("kind", ["sae", "diff"])
def test_tokens_by_log_odds(world, kind):
    index, documents = made(world, kind), brute(world, kind)
    vocabulary = Counter(int(i) for one in documents for i in one.ids[one.measured])
    total, texts = sum(vocabulary.values()), {}
    counted = [latent for latent in index.latents if index.row(int(latent))["fires"] <= EVENTS]
    assert len(counted) > 30
    for latent in counted:
        counts = Counter(int(i) for one in documents for i in one.ids[one.value[:, latent] > 0])
        fires, z = sum(counts.values()), {}
        for token, here in counts.items():
            prior = PRIOR * vocabulary[token] / total
            inside, outside = here + prior, vocabulary[token] + prior
            left = np.log(inside / (fires + PRIOR - inside))
            right = np.log(outside / (total + PRIOR - outside))
            z[token] = (left - right) / np.sqrt(1 / inside + 1 / outside)
        expected = sorted((value for value in z.values() if value >= LEAST_Z), reverse=True)[:MOST]
        row = index.row(int(latent))
        near(row["tokens_z"], expected, rtol=1e-4)
        by_text = dict(zip(token_texts(world.pair.tokenizer, list(z)), z.values(), strict=True))
        texts |= by_text
        near([by_text[token] for token in row["tokens"]], expected, rtol=1e-4)
    assert len(texts) > 20


def chunked(monkeypatch, tokens):
    monkeypatch.setattr(collect, "CHUNK_TOKENS", tokens)


def test_how_the_text_is_cut_up_changes_nothing(world, monkeypatch, tmp_path):
    whole = made(world)
    chunked(monkeypatch, 100)
    monkeypatch.setattr(windows, "GROUP_EXAMPLES", 30)
    cut = LatentIndex.open(run_examples(config_of(world, tmp_path / "run", tokens_per_batch=64)).path)
    assert cut.latents.tolist() == whole.latents.tolist()
    for latent in whole.latents:
        here, there = (one.examples(int(latent)) for one in (whole, cut))
        near([e.value for e in here], [e.value for e in there], rtol=1e-4)
        # Of the strongest, ties are cut by the order of the text; the sample's lots do not know it.
        drawn, again = (
            {(e.corpus, e.document, e.start, e.peak) for e in one if e.kind} for one in (here, there)
        )
        assert drawn == again
        assert whole.row(int(latent))["tokens"] == cut.row(int(latent))["tokens"]


def test_row_groups_hold_their_rows_in_order(world):
    import pyarrow.parquet as pq

    table = pq.read_table(made(world).path / EXAMPLES)
    keys = list(zip(*(table[name].to_pylist() for name in ("latent", "kind", "rank")), strict=True))
    assert keys == sorted(set(keys))


def short(folder):
    """A second corpus for runs that are made several times."""
    (folder / "short.jsonl").write_text('{"text": "seven apples and the mill"}\n{"text": "the river"}\n')
    return folder / "short.jsonl"


@pytest.mark.parametrize("one_at_a_time", [False, True])
def test_an_interrupted_run_goes_on(world, monkeypatch, tmp_path, one_at_a_time):
    chunked(monkeypatch, 100)
    one = (f"one={world.corpora['one']}", f"two={short(tmp_path)}")
    options = {"one_at_a_time": one_at_a_time, "corpus": one, "lens": False, "tokens_per_batch": 64}
    read, calls = collect.read_acts, []

    def counted(model, *rest):
        calls.append(model.name)
        if len(calls) == stop:
            raise KeyboardInterrupt
        return read(model, *rest)

    monkeypatch.setattr(collect, "read_acts", counted)
    stop = 0
    whole = run_examples(config_of(world, tmp_path / "whole", **options))
    total, stop = len(calls), len(calls) - 4
    calls.clear()
    with pytest.raises(KeyboardInterrupt):
        run_examples(config_of(world, tmp_path / "cut", **options))
    assert (tmp_path / "cut" / "parts" / "chunks").is_dir()
    stop = 0
    calls.clear()
    resumed = run_examples(config_of(world, tmp_path / "cut", resume=True, **options))
    assert 0 < len(calls) < total / 2
    for name in (LATENTS, EXAMPLES):
        assert (resumed.path / name).read_bytes() == (whole.path / name).read_bytes()
    assert not (resumed.path / "parts").exists()
    # A third time there is nothing to do.
    calls.clear()
    run_examples(config_of(world, tmp_path / "cut", resume=True, **options))
    assert calls == []


def test_one_model_at_a_time_gives_the_same(world, tmp_path):
    held = run_examples(config_of(world, tmp_path / "one", one_at_a_time=True))
    for name in (LATENTS, EXAMPLES):
        assert (held.path / name).read_bytes() == (made(world).path / name).read_bytes()


def test_the_seed_decides_the_sample_and_nothing_else(world, tmp_path):
    other = LatentIndex.open(run_examples(config_of(world, tmp_path / "seed", seed=5)).path)
    differ = 0
    for latent in other.latents:
        here, there = (
            [(e.kind, e.document, e.peak) for e in one.examples(int(latent))] for one in (made(world), other)
        )
        assert [row for row in here if not row[0]] == [row for row in there if not row[0]]
        differ += here != there
    assert differ > 10


def test_an_adapter_as_the_tuned_model(world, tmp_path):
    pair_fixture.adapt(world.base, tmp_path / "lora", pair_fixture.lora())
    config = config_of(world, tmp_path / "run", tuned=str(tmp_path / "lora"), tokens=200)
    index = LatentIndex.open(run_examples(config).path)
    rows = [index.row(int(latent)) for latent in index.latents]
    assert any(row["rate_base"] != row["rate_tuned"] for row in rows)
    assert any(abs(change) > 1e-6 for row in rows for change in row["changed_logits"]) is False


def chat(path):
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"How many sacks, {n}?"},
                {"role": "assistant", "content": f"{n} sacks."},
            ]
        }
        for n in range(12)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_roles_and_template_tokens(world, tmp_path):
    text = (f"chat={chat(tmp_path / 'chat.jsonl')}",)
    plain, whole = (
        LatentIndex.open(
            run_examples(
                config_of(world, tmp_path / f"run-{template}", "relu", corpus=text, template=template)
            ).path
        )
        for template in (False, True)
    )
    assert whole.about["tokens"] > plain.about["tokens"]
    for index, roles in ((plain, ("user", "assistant")), (whole, ("template", "user", "assistant"))):
        for latent in index.latents:
            row = index.row(int(latent))
            near(sum(row[f"share[{role}]"] for role in roles), 1.0)
            assert row["share[tool]"] is None
    shares = [plain.row(int(latent))["share[user]"] for latent in plain.latents]
    assert len(set(shares)) > 3


def test_chunks_are_bounded_where_little_is_measured(world, tmp_path, monkeypatch):
    """Long questions, short answers, and documents without any: memory hangs on what is read, not on what counts."""
    rows = [{"messages": [{"role": "user", "content": "seven apples and the mill " * 5}]} for _ in range(30)]
    rows += [{"messages": [*rows[0]["messages"], {"role": "assistant", "content": "12"}]}]
    path = tmp_path / "chat.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    chunked(monkeypatch, 200)
    make, sizes = collect.make_chunk, []

    def watched(*rest):
        sizes.append(len((found := make(*rest)).ids))
        return found

    monkeypatch.setattr(collect, "make_chunk", watched)
    roles = CorpusOptions(roles=("assistant",))
    config = config_of(world, tmp_path / "run", corpus=(str(path),), corpora=roles, neighbours=0, lens=False)
    index = LatentIndex.open(run_examples(config).path)
    assert max(sizes) <= 200 + 256 < sum(sizes) and 1 <= index.about["tokens"] <= 3
    assert all(index.row(int(latent))["share[assistant]"] == 1 for latent in index.latents)
    assert index.about["notes"] == [note for note in index.about["notes"] if "Neighbours" not in note]


def test_a_corpus_on_which_nothing_fires(world, tmp_path):
    """Beside one on which latents do: rates of 0, and no examples from it."""
    torch.manual_seed(0)
    made = Dictionary(32, 8, activation="relu", metadata={"site": SITE})
    subject = open_subject(world.base, None, world.dictionaries["relu"], None, ModelOptions(device="cpu"))
    ids = torch.tensor([[1, *subject.tokenizer("mill", add_special_tokens=False)["input_ids"]]])
    seen = subject.model("base").read(ids, [SITE]).acts[SITE][0, -1].float()
    with torch.no_grad():
        # Only what points very nearly where the one known token points passes the bias.
        made.W_enc.copy_((seen / seen.norm())[None, :, None].expand_as(made.W_enc))
        made.b_enc.fill_(-0.99 * float(seen.norm()))
    made.save_pretrained(tmp_path / "few")
    for name, text in (("mill", "mill"), ("other", "日本 🙂 日本")):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"text": text}) + "\n")
    text = tuple(f"{name}={tmp_path / name}.jsonl" for name in ("mill", "other"))
    config = config_of(world, tmp_path / "run", str(tmp_path / "few"), tuned=None, corpus=text)
    index = LatentIndex.open(run_examples(config).path)
    assert len(index) == 8
    for latent in index.latents:
        row = index.row(int(latent))
        assert row["rate[mill]"] > 0 == row["rate[other]"]
        assert {one.corpus for one in index.examples(int(latent))} == {"mill"}


def test_tiny_text(world, tmp_path):
    """One document of one token, fewer than any number asked for."""
    (tmp_path / "one.jsonl").write_text(json.dumps({"text": "7"}) + "\n")
    config = config_of(world, tmp_path / "run", corpus=(str(tmp_path / "one.jsonl"),))
    index = LatentIndex.open(run_examples(config).path)
    assert index.about["tokens"] == 1 and 6 <= len(index) <= 12
    found = index.examples(int(index.latents[0]))
    assert [one.kind for one in found] == [0, 1] and found[0].tokens == ["<s>", "7"]


def test_no_bins_no_neighbours_no_lens(world, tmp_path):
    config = config_of(world, tmp_path / "run", bins=0, neighbours=0, lens=False, before=0, after=0)
    index = LatentIndex.open(run_examples(config).path)
    for latent in index.latents[:5]:
        row = index.row(int(latent))
        assert row["neighbours"] is None and row["promoted_base"] is None and row["changed"] is None
        assert all(one.kind == 0 and len(one.ids) == 1 for one in index.examples(int(latent)))
    assert index.about["lens"] == {"base": False, "tuned": False}


def test_a_run_can_be_opened_as_its_subject_again(world):
    subject = subject_of(made(world, "pair").path, ModelOptions(device="cpu"))
    assert subject.sides == ("base", "tuned") and subject.site == SITE
    acts = torch.randn(7, 2, 32)
    signals = subject.signals(acts)
    assert signals.base is not None
    near(signals.base.dense(), subject.dictionary.encode(acts[:, :1].expand(-1, 2, -1)).dense())


def test_another_dictionary_at_the_recorded_place_is_refused(world, tmp_path):
    path = make_dictionary(tmp_path / "sae")
    text = (str(short(tmp_path)),)
    run_examples(config_of(world, tmp_path / "run", path, corpus=text, lens=False))
    assert subject_of(tmp_path / "run").site == SITE
    shutil.rmtree(path)
    make_dictionary(tmp_path / "sae", seed=9)
    with pytest.raises(ArtifactError, match="is not the dictionary"):
        subject_of(tmp_path / "run")


def test_the_larger_of_two_codes(world):
    dictionary = open_subject(
        world.base, None, world.dictionaries["relu"], None, ModelOptions(device="cpu")
    ).dictionary
    left, right = (dictionary.encode(torch.randn(9, 32)) for _ in range(2))
    found = larger(left, right)
    near(found.dense(), torch.maximum(left.dense(), right.dense()))
    values = [row.tolist() for row in found.values.split(found.crow.diff().tolist())]
    assert all(row == sorted(row, reverse=True) for row in values)


class TestBadInput:
    def test_a_crosscoder_needs_two_models(self, world, tmp_path):
        with pytest.raises(ConfigError, match="view pair"):
            run_examples(config_of(world, tmp_path / "x", "pair", tuned=None))
        with pytest.raises(ConfigError, match="Leave --one-at-a-time out"):
            run_examples(config_of(world, tmp_path / "x", "diff", one_at_a_time=True))

    def test_a_dictionary_of_another_width(self, world, tmp_path):
        Dictionary(16, 8, k=2, metadata={"site": SITE}).save_pretrained(tmp_path / "narrow")
        with pytest.raises(DictionaryError, match="width"):
            run_examples(config_of(world, tmp_path / "x", str(tmp_path / "narrow")))

    def test_codes_that_are_no_numbers(self, world, tmp_path):
        made = Dictionary(32, 8, activation="relu", metadata={"site": SITE})
        with torch.no_grad():
            made.W_enc.mul_(1e38)
        made.save_pretrained(tmp_path / "huge")
        with pytest.raises(NumericsError, match="NaN or infinite"):
            run_examples(config_of(world, tmp_path / "x", str(tmp_path / "huge")))

    def test_a_dictionary_that_never_fires(self, world, tmp_path):
        made = Dictionary(32, 8, activation="relu", metadata={"site": SITE})
        with torch.no_grad():
            made.b_enc.sub_(1e6)
        made.save_pretrained(tmp_path / "dead")
        with pytest.raises(CorpusError, match="No latent"):
            run_examples(config_of(world, tmp_path / "x", str(tmp_path / "dead")))

    def test_text_without_a_token_to_measure(self, world, tmp_path):
        with pytest.raises(CorpusError, match="no token to measure"):
            run_examples(config_of(world, tmp_path / "x", corpora=CorpusOptions(roles=("tool",))))
        assert not (tmp_path / "x").exists()

    @pytest.mark.parametrize(
        "changes",
        [{"tops": 0}, {"bins": -1}, {"before": 10**6}, {"corpus": ()}, {"site": " "}, {"neighbours": 1000}],
    )
    def test_numbers_out_of_range(self, world, tmp_path, changes):
        with pytest.raises(ConfigError):
            config_of(world, tmp_path / "x", **changes)

    def test_one_name_for_two_corpora(self, world, tmp_path):
        paths = tuple(f"a={path}" for path in world.corpora.values())
        with pytest.raises(ConfigError, match="different names"):
            run_examples(config_of(world, tmp_path / "x", corpus=paths))
