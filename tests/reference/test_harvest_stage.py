"""The harvest stage: a store whose rows are those of a direct capture, also after an interruption."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from helpers import assert_close, assert_not_close
from pair_fixture import adapt, lora
from palimpsest.artifacts import open_artifact
from palimpsest.corpus import Corpus
from palimpsest.errors import ArtifactError, ConfigError, SiteError
from palimpsest.harvest import HarvestConfig, run_harvest
from palimpsest.models import fingerprint, load_model, load_pair
from palimpsest.options import CorpusOptions, ModelOptions, RunOptions
from palimpsest.store import ActivationStore, StoreWriter

SITES = ("resid_post.50%", "blocks.1.hook_mlp_out")
CANONICAL = ["resid_post.0", "mlp_out_post.1"]


@pytest.fixture
def config(base, text, tmp_path):
    """A harvest of one model; keywords change single fields."""

    def make(out="store", *, resume=False, overwrite=False, **changes):
        fields = {
            "corpus": (str(text),),
            "site": SITES,
            "run": RunOptions(out=tmp_path / out, resume=resume, overwrite=overwrite),
            "store_dtype": "float32",
            "models": ModelOptions(tokens_per_batch=128),
            "corpora": CorpusOptions(max_length=64),
        }
        return HarvestConfig(str(base), **(fields | changes))

    return make


def rows(path, site):
    """A store's rows in the order of documents and positions."""
    store = ActivationStore(path)
    batches = list(store.batches(50, site))
    document, position, tokens = (
        torch.cat([getattr(batch, name) for batch in batches])
        for name in ("document", "position", "token_ids")
    )
    order = (document * 1000 + position).argsort()
    acts = torch.cat([batch.acts for batch in batches])
    return document[order], position[order], tokens[order], acts[order]


def direct(folder, text, site):
    """`[tokens, d_model]` of every measured token, one document at a time."""
    model = load_model(folder)
    found = []
    for document in Corpus(text, model.tokenizer, max_length=64).documents():
        acts = model.read(torch.from_numpy(document.token_ids).long()[None], [site]).acts[site]
        found.append(acts[0, torch.from_numpy(~document.special)])
    return torch.cat(found)


def places(folder, text):
    documents = Corpus(text, load_model(folder).tokenizer, max_length=64).documents()
    return [
        (document.index, place, int(document.token_ids[place]))
        for document in documents
        for place in range(len(document.token_ids))
        if not document.special[place]
    ]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_store_of_one_model(config, base, text, dtype):
    artifact = run_harvest(config(store_dtype=dtype))
    store = ActivationStore(artifact.path)
    assert (store.sites, store.models, store.d_model) == (CANONICAL, ["base"], 32)
    assert store.dtype == getattr(torch, dtype)
    for site in CANONICAL:
        *labels, acts = rows(artifact.path, site)
        assert list(zip(*(one.tolist() for one in labels), strict=True)) == places(base, text)
        expected = direct(base, text, site)
        tight = {"rtol": 1e-4, "atol": 1e-4} if dtype == "float32" else {"rtol": 1e-2, "atol": 1e-3}
        assert_close(acts[:, 0].float(), expected, **tight)


@pytest.mark.parametrize("kind", ["full", "adapter"])
def test_a_store_of_a_pair(config, base, tuned, text, tmp_path, kind, tiny_tokenizer):
    other, merged = tuned, tuned
    if kind == "adapter":
        model = adapt(base, tmp_path / "adapter", lora())
        other, merged = tmp_path / "adapter", tmp_path / "merged"
        model.merge_and_unload().save_pretrained(merged)
        tiny_tokenizer.save_pretrained(merged)
    artifact = run_harvest(config(tuned=str(other)))
    assert ActivationStore(artifact.path).models == ["base", "tuned"]
    for site in CANONICAL:
        acts = rows(artifact.path, site)[-1]
        assert_close(acts[:, 0], direct(base, text, site), rtol=1e-4, atol=1e-4)
        assert_close(acts[:, 1], direct(merged, text, site), rtol=1e-3, atol=1e-3)
        assert_not_close(acts[:, 0], acts[:, 1], atol=0.05)


def test_the_manifest_says_where_rows_come_from(config, base, tuned, text):
    manifest = run_harvest(config(tuned=str(tuned))).manifest
    pair = load_pair(base, tuned)
    assert (manifest["stage"], manifest["status"]) == ("store", "complete")
    assert manifest["inputs"]["base"]["sha256"] == fingerprint(pair.base)
    assert manifest["inputs"]["tuned"]["sha256"] == fingerprint(pair.tuned)
    assert manifest["inputs"]["corpus"]["path"] == str(text)
    assert manifest["config"]["site"] == list(SITES) and manifest["config"]["store_dtype"] == "float32"


@pytest.mark.parametrize("tuned_too", [False, True])
def test_an_interrupted_harvest_goes_on(config, tuned, monkeypatch, tuned_too):
    changes = {"tuned": str(tuned)} if tuned_too else {}
    monkeypatch.setattr("palimpsest.harvest.run.StoreWriter", partial(StoreWriter, shard_bytes=4000))
    whole = run_harvest(config("whole", **changes))
    shards = len(ActivationStore(whole.path).shards)
    append, calls = StoreWriter.append, []

    def failing(self, acts, **labels):
        calls.append(set(labels["document"].tolist()))
        if len(calls) == 4:
            raise KeyboardInterrupt
        append(self, acts, **labels)

    monkeypatch.setattr(StoreWriter, "append", failing)
    with pytest.raises(KeyboardInterrupt):
        run_harvest(config("cut", **changes))
    before = calls.copy()
    running = open_artifact(config("cut").run.out, stage="store", allow_running=True)
    kept = ActivationStore(running.path, allow_running=True)
    assert running.manifest["status"] == "running" and 0 < len(kept.shards) < shards
    with pytest.raises(ArtifactError):
        ActivationStore(running.path)
    with pytest.raises(ArtifactError, match="--resume"):
        run_harvest(config("cut", **changes))
    with pytest.raises(ArtifactError, match="store_dtype"):
        run_harvest(config("cut", resume=True, store_dtype="bfloat16", **changes))
    calls.extend([set()] * 10)  # no further interruption
    resumed = run_harvest(config("cut", resume=True, **changes))
    stored = {int(d) for i in range(len(kept.shards)) for d in kept.labels(i)["document"].unique()}
    again = set().union(*calls[len(before) + 10 :])
    assert stored and not stored & again  # what was stored is not computed again
    for site in CANONICAL:
        for found, expected in zip(rows(resumed.path, site), rows(whole.path, site), strict=True):
            assert torch.equal(found, expected)
    first, second = (ActivationStore(one.path).statistics[CANONICAL[0]] for one in (resumed, whole))
    assert first.count == second.count and torch.allclose(first.mean, second.mean)


def test_a_finished_store_is_not_written_again(config, monkeypatch):
    path = run_harvest(config()).path
    before = (path / "manifest.json").read_bytes()
    with pytest.raises(ArtifactError, match="finished"):
        run_harvest(config())

    def never(*_, **__):
        raise AssertionError("a finished run was computed again")

    with monkeypatch.context() as patch:
        patch.setattr(StoreWriter, "append", never)
        assert run_harvest(config(resume=True)).path == path
    assert (path / "manifest.json").read_bytes() == before
    assert run_harvest(config(overwrite=True, site=("resid_pre.1",))).manifest["config"]["site"] == [
        "resid_pre.1"
    ]


def test_what_makes_no_store(config, tuned, tmp_path):
    with pytest.raises(ConfigError, match="needs a site"):
        run_harvest(config(site=()))
    with pytest.raises(ConfigError, match="side by side"):
        run_harvest(config(tuned=str(tuned), models=ModelOptions(one_at_a_time=True)))
    with pytest.raises(SiteError, match="layers run from 0 to 1"):
        run_harvest(config(site=("resid_post.0", "resid_post.2")))
    assert not (tmp_path / "store").exists()
    with pytest.raises(ConfigError, match="different sites"):
        run_harvest(config(site=("resid_post.1", "resid_post.100%")))


def test_a_store_of_a_wider_site(config, base, text):
    path = run_harvest(config(site=("mlp_act.0",))).path
    assert ActivationStore(path).d_model == 64
    found = rows(path, "mlp_act.0")[-1]
    assert_close(found[:, 0], direct(base, text, "mlp_act.0"), rtol=1e-4, atol=1e-4)
    with pytest.raises(ConfigError, match=r"one width.*mlp_act\.0: 64, resid_post\.0: 32"):
        run_harvest(config("mixed", site=("mlp_act.0", "resid_post.0")))
