"""The live check: a store is accepted by the models it was harvested from, and by no others."""

from __future__ import annotations

import json
import logging
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from pair_fixture import adapt, fine_tune, lora
from palimpsest.artifacts import disk, file_sha256
from palimpsest.errors import ArtifactError
from palimpsest.harvest import HarvestConfig, check_store, run_harvest
from palimpsest.models import load_model, load_pair
from palimpsest.options import CorpusOptions, ModelOptions, RunOptions
from palimpsest.store import ActivationStore

SITES = ("resid_post.0", "resid_post.1")


@pytest.fixture
def harvested(base, text, tmp_path):
    """A store of the base, or of the pair with `tuned`; keywords change single fields of the harvest."""

    def make(tuned=None, **changes):
        config = HarvestConfig(
            str(base),
            corpus=(str(text),),
            site=SITES,
            run=RunOptions(out=tmp_path / "store"),
            tuned=None if tuned is None else str(tuned),
            models=ModelOptions(tokens_per_batch=128),
            corpora=CorpusOptions(max_length=64),
        )
        return ActivationStore(run_harvest(replace(config, **changes)).path)

    return make


@pytest.mark.parametrize("store_dtype", ["float32", "bfloat16"])
def test_the_model_of_a_store_is_accepted(harvested, base, store_dtype, caplog):
    store = harvested(store_dtype=store_dtype)
    probe = store.probe()
    assert probe is not None and probe.compute == "float32" and len(probe.input_ids) == 4
    assert not probe.keep[:, 0].any() and (probe.input_ids[:, 0] == 1).all()  # the BOS is there, and not kept
    with caplog.at_level(logging.WARNING, "palimpsest"):
        error = check_store(store, load_model(base))
    assert 0 <= error < 5e-4 and caplog.records == []


@pytest.mark.parametrize("kind", ["full", "adapter"])
def test_the_pair_of_a_store_is_accepted_on_both_sides(harvested, base, tuned, adapter, kind):
    other = tuned if kind == "full" else adapter
    store = harvested(other)
    assert check_store(store, load_pair(base, other)) < 5e-4
    assert check_store(store, load_model(base)) < 5e-4
    alone = ModelOptions(one_at_a_time=True)
    assert check_store(store, load_pair(base, other, alone)) < 5e-4


def test_other_weights_are_refused_with_model_site_document_and_reason(harvested, base, tuned):
    store = harvested()
    with pytest.raises(ArtifactError) as caught:
        check_store(store, load_model(tuned))
    message = str(caught.value)
    for part in ("base model", "resid_post.0", "document", "other weights", str(base), str(tuned)):
        assert part in message


@pytest.mark.parametrize("store_dtype", ["float32", "bfloat16"])
def test_a_slight_fine_tune_is_told_from_its_base(harvested, base, tiny_tokenizer, tmp_path, store_dtype):
    store = harvested(store_dtype=store_dtype)
    near = fine_tune(base, tmp_path / "near", tiny_tokenizer, seed=9, scale=0.002)
    with pytest.raises(ArtifactError, match="other weights"):
        check_store(store, load_model(near))


def test_the_wrong_side_of_a_pair_is_named(harvested, base, tuned, tiny_tokenizer, tmp_path):
    store = harvested(tuned)
    other = fine_tune(base, tmp_path / "other", tiny_tokenizer, seed=9)
    with pytest.raises(ArtifactError, match=r"as its tuned model.*other weights, those of .*tuned"):
        check_store(store, load_pair(base, other))
    with pytest.raises(ArtifactError, match="as its base model"):
        check_store(store, load_pair(tuned, base))


def test_an_adapter_that_is_not_the_stores_is_refused(harvested, base, adapter, tmp_path):
    adapt(base, tmp_path / "other", lora(), seed=2)
    with pytest.raises(ArtifactError, match="as its tuned model"):
        check_store(harvested(adapter), load_pair(base, tmp_path / "other"))


def test_the_first_site_that_differs_is_named(harvested, base, tiny_tokenizer, tmp_path, caplog):
    from pair_fixture import load_hf, save

    model = load_hf(base)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.mul_(1.5)
    changed = load_model(save(model, tmp_path / "late", tiny_tokenizer))
    with pytest.raises(ArtifactError, match=r"at resid_post\.1\."):
        check_store(harvested(), changed)
    run = RunOptions(out=tmp_path / "early")
    # Below the layer that was changed the activations are the same: accepted, and said.
    with caplog.at_level(logging.WARNING, "palimpsest"):
        assert check_store(harvested(site=SITES[:1], run=run), changed) < 5e-4
    assert "harvested from other weights" in caplog.text


def rewrite(store, change):
    """Change a shard's tensors, with hashes that fit."""
    name = "shard-00000.safetensors"
    tensors = load_file(store.path / name)
    change(tensors)
    save_file(tensors, store.path / name)
    entry = {"sha256": file_sha256(store.path / name), "bytes": (store.path / name).stat().st_size}
    index = json.loads((store.path / "store.json").read_text())
    index["shards"][0] |= entry
    (store.path / "store.json").write_text(json.dumps(index))
    manifest = json.loads((store.path / "manifest.json").read_text())
    manifest["files"]["store.json"]["sha256"] = file_sha256(store.path / "store.json")
    (store.path / "manifest.json").write_bytes(disk.to_json(manifest))
    return ActivationStore(store.path)


def test_rows_that_moved_against_their_tokens_are_refused(harvested, base):
    def roll(tensors):
        tensors["acts.resid_post.1"] = tensors["acts.resid_post.1"].roll(1, 0).contiguous()

    with pytest.raises(ArtifactError, match=r"resid_post\.1.*its rows were changed"):
        check_store(rewrite(harvested(), roll), load_model(base))


def test_sides_that_were_exchanged_are_refused(harvested, base, tuned):
    def exchange(tensors):
        for site in SITES:
            tensors[f"acts.{site}"] = tensors[f"acts.{site}"].flip(1).contiguous()

    with pytest.raises(ArtifactError, match="as its base model"):
        check_store(rewrite(harvested(tuned), exchange), load_pair(base, tuned))


def test_tokens_that_are_not_there_are_refused(harvested, base):
    def forget(tensors):
        tensors["token_ids"] += 1

    with pytest.raises(ArtifactError, match="does not hold the tokens"):
        check_store(rewrite(harvested(), forget), load_model(base))


def test_another_version_of_transformers_is_given_as_the_reason(harvested, base):
    store = harvested()
    store.manifest["packages"]["transformers"] = "5.0.1"
    model = load_model(base)
    model.model.model.layers[0].register_forward_hook(
        lambda _module, _inputs, output: (
            (output[0] * 1.01, *output[1:]) if isinstance(output, tuple) else output * 1.01
        )
    )
    with pytest.raises(ArtifactError, match=r"harvested with transformers 5\.0\.1, this is \d"):
        check_store(store, model)


def test_sixteen_bits_are_allowed_their_rounding_and_no_more(harvested, base, tuned, tmp_path):
    half = ModelOptions(dtype="bfloat16", tokens_per_batch=128)
    store = harvested(models=half)
    assert store.probe().compute == "bfloat16"
    for options in (half, ModelOptions(dtype="float32")):
        assert check_store(store, load_model(base, options)) < 5e-2
        with pytest.raises(ArtifactError):
            check_store(store, load_model(tuned, options))
    full = harvested(run=RunOptions(out=tmp_path / "full"))
    assert 1e-3 < check_store(full, load_model(base, half)) < 5e-2


def test_a_model_of_another_width_or_vocabulary_is_refused(harvested, tiny_llama):
    store = harvested()
    with pytest.raises(ArtifactError, match=r"another width.*Expected: 48.*Found: 32"):
        check_store(store, load_model(tiny_llama(hidden_size=48)))
    small = load_model(tiny_llama())
    small.model.resize_token_embeddings(100)
    with pytest.raises(ArtifactError, match="tokens below 100"):
        check_store(store, small)


def test_a_store_from_before_there_were_probes_is_used_with_a_warning(harvested, base, caplog):
    store = harvested()
    del store.index["probe"]
    with caplog.at_level(logging.WARNING, "palimpsest"):
        assert check_store(store, load_model(base)) is None
    assert "it is used unchecked" in caplog.text
