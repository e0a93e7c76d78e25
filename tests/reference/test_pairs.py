"""Pairs: an adapter on one set of weights against its merged checkpoint, revisions, weight comparison."""

from __future__ import annotations

import shutil

import pytest
import torch

from helpers import assert_close, assert_not_close
from pair_fixture import adapt, load_hf, lora, save
from palimpsest.errors import PairError
from palimpsest.models import fingerprint, load_model, load_pair, tlens_from_site, weight_deltas
from palimpsest.options import ModelOptions

SITES = ["resid_pre.0", "attn_out.0", "mlp_out.0", "resid_post.0", "resid_post.1"]


@pytest.fixture
def ids():
    return torch.randint(3, 320, (2, 13), generator=torch.Generator().manual_seed(4))


@torch.no_grad()
def losses(side, ids):
    head_input = side.read(ids, [], head=True).head_input[:, :-1].flatten(0, 1)
    logits = side.head.logits(head_input)
    return torch.nn.functional.cross_entropy(logits, ids[:, 1:].flatten(), reduction="none")


@torch.no_grad()
def hf_losses(folder, ids):
    logits = load_hf(folder)(input_ids=ids).logits[:, :-1].flatten(0, 1)
    return torch.nn.functional.cross_entropy(logits, ids[:, 1:].flatten(), reduction="none")


ADAPTERS = ["lora", "rslora", "dora", "head", "embeddings", "modules_to_save", "tokens", "ia3"]


def configuration(kind):
    from peft import IA3Config

    return {
        "lora": lora(),
        "rslora": lora(use_rslora=True, layers_to_transform=[1]),
        "dora": lora(use_dora=True),
        "head": lora(target_modules=["q_proj", "lm_head"]),
        "embeddings": lora(target_modules=["q_proj", "embed_tokens"]),
        "modules_to_save": lora(modules_to_save=["lm_head"]),
        "tokens": lora(target_modules=["q_proj"], trainable_token_indices=[5, 6, 40]),
        "ia3": IA3Config(
            target_modules=["k_proj", "v_proj", "down_proj"],
            feedforward_modules=["down_proj"],
            task_type="CAUSAL_LM",
        ),
    }[kind]


@pytest.fixture(scope="module", params=ADAPTERS)
def adapter(request, base, tiny_tokenizer, tmp_path_factory):
    """Both folders of one fine-tune: the adapter, and the checkpoint it is merged into."""
    folder = tmp_path_factory.mktemp(request.param)
    model = adapt(base, folder / "adapter", configuration(request.param))
    return folder / "adapter", save(model.merge_and_unload(), folder / "merged", tiny_tokenizer)


@pytest.fixture(scope="module")
def lora_folder(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("lora") / "adapter"
    adapt(base, folder, lora())
    return folder


def test_an_adapter_pair_is_the_pair_with_the_merged_checkpoint(base, adapter, ids):
    ours, merged = load_pair(base, adapter[0]), load_pair(base, adapter[1])
    assert (ours.kind, merged.kind) == ("adapter", "full")
    found, expected = ours.tuned.read(ids, SITES).acts, merged.tuned.read(ids, SITES).acts
    for site in SITES:
        assert_close(found[site], expected[site], rtol=1e-4, atol=5e-5)
    assert_not_close(found["resid_post.1"], ours.base.read(ids, SITES).acts["resid_post.1"], atol=1e-2)
    assert_close(losses(ours.tuned, ids), hf_losses(adapter[1], ids), rtol=1e-4, atol=1e-4)
    assert_not_close(losses(ours.tuned, ids), losses(ours.base, ids), atol=1e-2)


def test_the_base_side_of_an_adapter_pair_is_the_base(base, adapter, ids):
    pair, plain = load_pair(base, adapter[0]), load_model(base)
    before, expected = pair.base.read(ids, SITES, head=True), plain.read(ids, SITES, head=True)
    pair.tuned.read(ids, SITES)
    after = pair.base.read(ids, SITES, head=True)
    for site in SITES:
        assert torch.equal(before.acts[site], expected.acts[site])
        assert torch.equal(after.acts[site], expected.acts[site])
    assert torch.equal(after.head_input, expected.head_input)
    assert torch.equal(losses(pair.base, ids), losses(plain, ids))


def test_weight_deltas_of_an_adapter_are_those_of_the_merged_checkpoint(base, adapter):
    pair = load_pair(base, adapter[0])
    before = {name: parameter.clone() for name, parameter in pair.tuned.model.named_parameters()}
    found, expected = weight_deltas(pair), weight_deltas(load_pair(base, adapter[1]))
    assert [row.layer for row in found] == [0, 1, None]
    for mine, merged in zip(found, expected, strict=True):
        assert mine[1:] == pytest.approx(merged[1:], rel=1e-4, abs=1e-6)
    assert sum(row.norm_delta for row in found) > 0.1
    assert all(torch.equal(before[name], now) for name, now in pair.tuned.model.named_parameters())


def test_fingerprints_tell_models_apart_whatever_holds_them(base, adapter, ids):
    pair, plain, merged = load_pair(base, adapter[0]), load_model(base), load_model(adapter[1])
    assert fingerprint(pair.base) == fingerprint(plain) == fingerprint(load_pair(base, adapter[1]).base)
    assert len({fingerprint(plain), fingerprint(pair.tuned), fingerprint(merged)}) == 3
    again = load_pair(base, adapter[0])
    again.tuned.read(ids, SITES)
    assert (fingerprint(again.base), fingerprint(again.tuned)) == (
        fingerprint(pair.base),
        fingerprint(pair.tuned),
    )


def test_an_adapter_pair_holds_one_set_of_weights(base, lora_folder):
    pair = load_pair(base, lora_folder, ModelOptions(one_at_a_time=True))
    assert pair.base.model is pair.tuned.model and not pair.one_at_a_time
    parameters = dict(pair.tuned.model.named_parameters())
    added = sum(p.numel() for name, p in parameters.items() if "lora_" in name)
    plain = sum(p.numel() for p in load_hf(base).parameters())
    assert sum(p.numel() for p in parameters.values()) == plain + added
    assert 0 < added < plain / 2


def test_full_pairs_are_the_two_checkpoints(base, tuned, ids):
    pair = load_pair(base, tuned)
    assert pair.kind == "full" and pair.base.model is not pair.tuned.model
    assert pair.base.tokenizer is pair.tuned.tokenizer
    for side, folder in ((pair.base, base), (pair.tuned, tuned)):
        assert_close(losses(side, ids), hf_losses(folder, ids), rtol=1e-4, atol=1e-4)
        assert side.name == str(folder) and side.dtype == torch.float32
    with pair.both() as (a, b):
        assert a is pair.base and b is pair.tuned


def test_dtype_and_loading_arguments_reach_transformers(base, tuned):
    options = ModelOptions(dtype="bfloat16", load_kwargs={"attn_implementation": "eager"})
    pair = load_pair(base, tuned, options)
    for side in (pair.base, pair.tuned):
        assert side.dtype == torch.bfloat16
        assert side.text_config._attn_implementation == "eager"


def test_two_revisions_of_one_repository(base, tuned, ids, tmp_path, monkeypatch):
    import huggingface_hub

    repository = tmp_path / "models--someone--model"
    for revision, commit, folder in (("main", "a" * 40, base), ("v2", "b" * 40, tuned)):
        (repository / "refs").mkdir(parents=True, exist_ok=True)
        (repository / "refs" / revision).write_text(commit)
        shutil.copytree(folder, repository / "snapshots" / commit)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    pair = load_pair("someone/model", "someone/model", ModelOptions(tuned_revision="v2"))
    assert fingerprint(pair.base) == fingerprint(load_model(base))
    assert fingerprint(pair.tuned) == fingerprint(load_model(tuned))
    same = load_pair("someone/model", "someone/model", ModelOptions(revision="v2"))
    assert fingerprint(same.base) == fingerprint(same.tuned) == fingerprint(pair.tuned)
    with pytest.raises(PairError, match="someone/model"):
        load_pair("someone/model", "someone/model", ModelOptions(tuned_revision="v3"))


def test_one_at_a_time_pairs_hold_one_model(base, tuned):
    pair = load_pair(base, tuned, ModelOptions(one_at_a_time=True))
    assert not pair.loaded("base") and not pair.loaded("tuned")
    first = fingerprint(pair.base)
    assert pair.loaded("base") and not pair.loaded("tuned")
    assert fingerprint(pair.tuned) != first
    assert pair.loaded("tuned") and not pair.loaded("base")
    with pytest.raises(PairError, match="one model at a time"), pair.both():
        pass


def test_fingerprints_survive_saving_and_notice_small_changes(base, tiny_tokenizer, tmp_path):
    model = load_model(base)
    same = save(model.model, tmp_path / "same", tiny_tokenizer)
    assert fingerprint(load_model(same)) == fingerprint(model)
    half = save(model.model.to(torch.bfloat16), tmp_path / "half", tiny_tokenizer)
    assert (
        fingerprint(load_model(half))
        == fingerprint(load_model(half, ModelOptions(dtype="bfloat16")))
        != fingerprint(load_model(base))
    )
    with torch.no_grad():
        changed = load_model(base)
        changed.model.model.norm.weight[3] += 1e-4
    assert fingerprint(changed) != fingerprint(load_model(base))


def test_weight_deltas_of_full_checkpoints(base, tuned):
    before, after = (dict(load_hf(folder).named_parameters()) for folder in (base, tuned))
    for row in weight_deltas(load_pair(base, tuned)):
        names = [
            name
            for name in before
            if (f"layers.{row.layer}." in name if row.layer is not None else "layers." not in name)
        ]
        weights = torch.cat([before[name].detach().double().flatten() for name in names])
        deltas = torch.cat([(after[name] - before[name]).detach().double().flatten() for name in names])
        assert row.norm_base == pytest.approx(weights.norm().item(), rel=1e-6)
        assert row.norm_delta == pytest.approx(deltas.norm().item(), rel=1e-6)
        assert row.relative == pytest.approx(row.norm_delta / row.norm_base)
    assert [row.norm_delta for row in weight_deltas(load_pair(base, base))] == [0, 0, 0]


def test_added_tokens_in_the_fine_tune_are_fine(base, tiny_tokenizer, ids, tmp_path):
    tokenizer = type(tiny_tokenizer).from_pretrained(base)
    assert tokenizer.add_tokens(["<tool>", "<end>"], special_tokens=True) == 2
    model = load_hf(base)
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    with torch.no_grad():
        model.lm_head.weight[:5] += 1
    pair = load_pair(base, save(model, tmp_path / "more", tokenizer))
    assert pair.tuned.sites.head.module.weight.shape[0] == 322 and len(pair.tokenizer) == 320
    assert torch.equal(
        pair.tuned.read(ids, SITES).acts["resid_post.1"], pair.base.read(ids, SITES).acts["resid_post.1"]
    )
    outside = weight_deltas(pair)[-1]
    assert outside.layer is None and outside.norm_delta == pytest.approx((5 * 32) ** 0.5)


def test_the_fine_tunes_chat_template_is_used_when_the_base_has_none(base, tuned, tmp_path):
    bare = shutil.copytree(base, tmp_path / "bare")
    (bare / "chat_template.jinja").unlink()
    assert load_model(bare).tokenizer.chat_template is None
    assert load_pair(bare, tuned).tokenizer.chat_template == load_model(tuned).tokenizer.chat_template
    assert load_pair(bare, tuned).tokenizer.chat_template


def test_a_fine_tune_without_a_tokenizer_is_read_with_the_bases(base, tuned, tmp_path):
    bare = shutil.copytree(tuned, tmp_path / "bare")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (bare / name).unlink()
    assert load_pair(base, bare).tokenizer.get_vocab() == load_pair(base, tuned).tokenizer.get_vocab()


def test_the_zoo_in_both_kinds_of_pair(zoo):
    ours, full = load_pair(zoo / "base", zoo / "math-lora"), load_pair(zoo / "base", zoo / "math")
    assert (ours.kind, full.kind) == ("adapter", "full")
    assert fingerprint(ours.base) == fingerprint(full.base)
    assert len({fingerprint(side) for side in (ours.base, ours.tuned, full.tuned)}) == 3
    for pair in (ours, full):
        rows = weight_deltas(pair)
        assert [row.layer for row in rows] == [0, 1, 2, 3, None]
        assert all(0.01 < row.relative < 1 for row in rows[:-1])
    assert tlens_from_site(ours.base.sites.canonical("resid_post.50%")) == "blocks.1.hook_resid_post"
