"""Sites, capture and replace against what transformers itself returns, on five architectures."""

from __future__ import annotations

import re
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from helpers import assert_close, assert_not_close, randomize
from palimpsest.errors import NumericsError, SiteError
from palimpsest.models import (
    SiteMap,
    canonical_site,
    capture,
    load_model,
    replace,
    site_from_tlens,
    tlens_from_site,
    verify_sites,
)
from palimpsest.models.sites import Tap

LAYERS, D_MODEL, VOCAB, SOFTCAP = 3, 32, 320, 2.5
COMMON = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "vocab_size": VOCAB}
LLAMA_LIKE = {
    "hidden_size": D_MODEL,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
} | COMMON
GROUPED = {"num_key_value_heads": 2, **LLAMA_LIKE}
FAMILIES = {
    "Llama": ("LlamaConfig", GROUPED),
    "Qwen2": ("Qwen2Config", GROUPED),
    "Gemma2": (
        "Gemma2Config",
        {"head_dim": 8, "query_pre_attn_scalar": 8, "final_logit_softcapping": SOFTCAP, **GROUPED},
    ),
    "GPT2": ("GPT2Config", {"n_embd": D_MODEL, "n_layer": LAYERS, "n_head": 4, "n_positions": 64, **COMMON}),
    "GPTNeoX": ("GPTNeoXConfig", LLAMA_LIKE),
}


def make(family, folder, tokenizer):
    import transformers

    name, fields = FAMILIES[family]
    model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, name)(**fields))
    randomize(model, seed=5)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return load_model(folder)


@pytest.fixture(scope="module", params=FAMILIES)
def model(request, tmp_path_factory, tiny_tokenizer):
    return make(request.param, tmp_path_factory.mktemp(request.param), tiny_tokenizer)


@pytest.fixture(scope="module")
def gemma(tmp_path_factory, tiny_tokenizer):
    return make("Gemma2", tmp_path_factory.mktemp("gemma"), tiny_tokenizer)


@pytest.fixture
def ids():
    return torch.randint(3, VOCAB, (2, 11), generator=torch.Generator().manual_seed(1))


def decoder_layers(model):
    decoder = model.model.base_model
    return decoder.h if hasattr(decoder, "h") else decoder.layers


@torch.inference_mode()
def forward(model, ids, **wanted):
    return model.model(input_ids=ids, use_cache=False, **wanted)


def hooks(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.model.modules())


@pytest.fixture
def runs(model, monkeypatch):
    """Count how often each layer, the final norm and the head really run."""
    counted: dict[str | int, int] = {}

    def count(name, module):
        inner = module.forward

        def counting(*args, **kwargs):
            counted[name] = counted.get(name, 0) + 1
            return inner(*args, **kwargs)

        monkeypatch.setattr(module, "forward", counting)

    for index, layer in enumerate(decoder_layers(model)):
        count(index, layer)
    count("norm", model.sites.final_norm)
    count("head", model.model.get_output_embeddings())
    return counted


def test_resid_post_is_output_hidden_states(model, ids):
    expected = forward(model, ids, output_hidden_states=True).hidden_states
    sites = [f"resid_post.{layer}" for layer in range(LAYERS)]
    found = model.read(ids, sites).acts
    assert list(found) == sites
    for layer in range(LAYERS - 1):
        assert torch.equal(found[f"resid_post.{layer}"], expected[layer + 1])
        assert torch.equal(model.read(ids, [sites[layer]]).acts[sites[layer]], expected[layer + 1])
    assert_not_close(found[sites[-1]], expected[-1])  # transformers' last one is behind the norm
    assert torch.equal(model.read(ids, ["resid_pre.0"]).acts["resid_pre.0"], expected[0])


def test_the_last_residual_gives_the_logits(model, ids):
    logits = forward(model, ids).logits
    last = f"resid_post.{LAYERS - 1}"
    reading = model.read(ids, [last], head=True)
    with torch.inference_mode():
        assert_close(model.sites.final_norm(reading.acts[last]), reading.head_input)
        rebuilt = model.sites.head.logits(reading.head_input.flatten(0, 1))
        raw = model.sites.head.module(reading.head_input.flatten(0, 1))
    assert_close(rebuilt.view_as(logits), logits, rtol=1e-5, atol=1e-5)
    capped = model.text_config.model_type == "gemma2"
    assert (model.sites.head.softcap == SOFTCAP) if capped else model.sites.head.softcap is None
    assert bool((raw - rebuilt).abs().max() > 0.1) == capped


def test_a_layer_adds_its_attention_and_its_mlp(model, ids):
    """The `_post` sites are what is added: behind the output norms that Gemma 2 has."""
    layer = 1
    points = ("resid_pre", "attn_out", "attn_out_post", "mlp_out", "mlp_out_post", "resid_post")
    acts = model.read(ids, [f"{point}.{layer}" for point in points]).acts
    assert {tuple(tensor.shape) for tensor in acts.values()} == {(2, 11, D_MODEL)}
    before, attention, added_attention, mlp, added_mlp, after = (acts[f"{p}.{layer}"] for p in points)
    assert_close(before + added_attention + added_mlp, after, atol=1e-5)
    normed = model.text_config.model_type == "gemma2"
    assert torch.equal(mlp, added_mlp) != normed and torch.equal(attention, added_attention) != normed


def test_transformer_lens_names_read_what_the_block_adds(model, ids):
    hooks_of = ("hook_resid_pre", "hook_attn_out", "hook_mlp_out", "hook_resid_post")
    acts = model.read(ids, [f"blocks.1.{hook}" for hook in hooks_of]).acts
    before, attention, mlp, after = (acts[f"blocks.1.{hook}"] for hook in hooks_of)
    assert_close(before + attention + mlp, after, atol=1e-5)
    assert torch.equal(after, model.read(ids, ["resid_post.1"]).acts["resid_post.1"])


def test_nothing_runs_behind_the_deepest_site(model, ids, runs):
    reading = model.read(ids, ["resid_post.1", "resid_pre.0"])
    assert runs == {0: 1, 1: 1} and reading.head_input is None
    runs.clear()
    model.read(ids, ["resid_pre.1"])
    assert runs == {0: 1}
    runs.clear()
    model.read(ids, ["resid_post.0"], head=True)
    assert runs == {0: 1, 1: 1, 2: 1, "norm": 1}
    runs.clear()
    forward(model, ids)
    assert runs == {0: 1, 1: 1, 2: 1, "norm": 1, "head": 1}


def test_capture_without_stopping_sees_the_whole_pass(model, ids, runs):
    with torch.inference_mode(), capture(model.sites, ["resid_post.0"], stop=False) as found:
        logits = model.model(input_ids=ids, use_cache=False).logits
        first = found["resid_post.0"]
        model.model(input_ids=ids[:1], use_cache=False)
    assert runs["head"] == 2 and logits.shape == (2, 11, VOCAB)
    assert first.shape[0] == 2 and found["resid_post.0"].shape[0] == 1


def test_capture_cuts_the_block_and_keeps_no_graph(model, ids):
    reached = False
    with capture(model.sites, ["resid_post.0"]) as found:
        model.model(input_ids=ids, use_cache=False)
        reached = True
    assert not reached and not found["resid_post.0"].requires_grad


def test_hooks_are_gone_after_success_and_after_errors(model, ids):
    forward(model, ids, output_hidden_states=True)
    before = hooks(model)
    model.read(ids, ["resid_post.1"], head=True)
    assert hooks(model) == before
    with pytest.raises(RuntimeError, match="mine"), capture(model.sites, ["resid_post.1"], stop=False):
        assert hooks(model) == before + 1
        raise RuntimeError("mine")
    assert hooks(model) == before
    with pytest.raises(IndexError):
        model.read(ids + 10 * VOCAB, ["resid_post.1"])
    assert hooks(model) == before
    with pytest.raises(SiteError), capture(model.sites, ["resid_post.0", "resid_post.99"]):
        pass
    assert hooks(model) == before

    def broken(hidden):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), replace(model.sites, "resid_post.0", broken):
        forward(model, ids)
    assert hooks(model) == before


def test_replace_with_the_same_changes_nothing(model, ids):
    for site in ("resid_post.1", "resid_pre.1", "attn_out.1", "mlp_out.1"):
        seen = []
        with replace(model.sites, site, lambda hidden, seen=seen: seen.append(hidden.shape) or hidden):
            logits = forward(model, ids).logits
        assert torch.equal(logits, forward(model, ids).logits)
        assert seen == [(2, 11, D_MODEL)]


def test_replace_changes_what_comes_after_and_nothing_before(model, ids):
    sites = [f"resid_post.{layer}" for layer in range(LAYERS)]
    plain = model.read(ids, sites).acts

    def edit(hidden):
        return torch.where(torch.arange(11)[:, None] >= 4, hidden.flip(-1), hidden)

    with replace(model.sites, "resid_post.1", edit):
        edited = model.read(ids, sites).acts
    assert torch.equal(edited[sites[0]], plain[sites[0]])
    assert torch.equal(edited[sites[1]], edit(plain[sites[1]]))
    assert torch.equal(edited[sites[2]][:, :4], plain[sites[2]][:, :4])
    assert_not_close(edited[sites[2]][:, 4:], plain[sites[2]][:, 4:])
    with replace(model.sites, "resid_pre.2", edit):
        assert torch.equal(model.read(ids, sites[2:]).acts[sites[2]], edited[sites[2]])
    with replace(model.sites, "mlp_out_post.1", torch.zeros_like):
        acts = model.read(ids, ["resid_pre.1", "attn_out_post.1", "resid_post.1"]).acts
    assert_close(acts["resid_pre.1"] + acts["attn_out_post.1"], acts["resid_post.1"], atol=1e-5)


def test_padding_on_the_right_changes_no_real_token(model, ids):
    short = torch.cat([ids[:1, :6], torch.zeros(1, 5, dtype=torch.long)], 1)
    padded = model.read(torch.cat([short, ids[1:]]), ["resid_post.2"]).acts["resid_post.2"]
    alone = model.read(ids[:1, :6], ["resid_post.2"]).acts["resid_post.2"]
    assert_close(padded[:1, :6], alone, rtol=1e-4, atol=1e-5)


def test_module_paths_read_the_output_of_that_module(model, ids):
    name, module = next((n, m) for n, m in model.model.named_modules() if n.endswith(".1.mlp"))
    assert model.sites.tap(f"path.{name}") == Tap(module, "output")
    acts = model.read(ids, [f"path.{name}", "mlp_out.1"]).acts
    assert torch.equal(acts[f"path.{name}"], acts["mlp_out.1"])


@pytest.mark.parametrize(
    ("site", "reason"),
    [
        ("resid_post.3", "layers run from 0 to 2"),
        ("blocks.7.hook_resid_post", "layers run from 0 to 2"),
        ("resid_post", "layer index"),
        ("nonsense.1", "nonsense"),
        ("path.no.such.module", "no attribute `no`"),
        ("resid_post.-1", "-1"),
        ("resid_post.120%", "0% to 100%"),
        ("resid post.1", "resid post"),
        ("", "empty"),
        ("blocks.1.ln1.hook_normalized", "inside a norm"),
        ("expert_indices.0", "router"),
    ],
)
def test_sites_that_do_not_exist_say_why(model, ids, site, reason):
    with pytest.raises(SiteError, match=re.escape(reason)):
        model.sites.tap(site)
    with pytest.raises(SiteError, match="[Ee]xpected"):
        model.read(ids, [site])


def test_sites_that_one_architecture_lacks(model):
    if model.text_config.model_type == "gpt_neox":
        with pytest.raises(SiteError, match="parallel"):
            model.sites.tap("resid_mid.1")
    else:
        assert model.sites.tap("resid_mid.1").side == "input"


def test_the_site_map_states_the_architecture_and_freezes_nothing(model):
    assert (model.sites.n_layers, model.sites.d_model) == (LAYERS, D_MODEL)
    assert all(parameter.requires_grad for parameter in model.model.parameters())


@pytest.mark.parametrize(
    ("site", "layers", "expected"),
    [
        ("resid_post.0%", 12, "resid_post.0"),
        ("resid_post.50%", 12, "resid_post.5"),
        ("mlp_out.100%", 12, "mlp_out.11"),
        ("resid_pre.62.5%", 8, "resid_pre.4"),
        ("resid_post.7", 12, "resid_post.7"),
        ("path.model.layers.3.mlp", 12, "path.model.layers.3.mlp"),
        ("blocks.4.hook_resid_mid", 12, "resid_mid.4"),
    ],
)
def test_canonical_sites(site, layers, expected):
    assert canonical_site(site, layers) == expected


@pytest.mark.parametrize(
    ("hook", "site"),
    [
        ("blocks.3.hook_resid_pre", "resid_pre.3"),
        ("blocks.3.hook_mlp_out", "mlp_out_post.3"),
        ("blocks.3.hook_attn_out", "attn_out_post.3"),
        ("blocks.3.mlp.hook_out", "mlp_out.3"),
        ("blocks.3.attn.hook_out", "attn_out.3"),
        ("blocks.3.attn.hook_z", "z.3"),
    ],
)
def test_transformer_lens_names_go_both_ways(hook, site):
    assert site_from_tlens(hook) == site and tlens_from_site(site) == hook
    assert tlens_from_site("path.model.layers.3.mlp") is None and tlens_from_site("no site") is None


def test_a_wrong_head_is_noticed(gemma, monkeypatch):
    verify_sites(gemma)
    monkeypatch.setattr(gemma.sites, "head", gemma.sites.head._replace(softcap=None))
    with pytest.raises(SiteError, match="head of"):
        verify_sites(gemma)


def test_wrong_sites_are_noticed(gemma, monkeypatch):
    tap = gemma.sites.tap
    monkeypatch.setattr(
        gemma.sites, "tap", lambda site: tap("resid_mid.0" if site == "resid_pre.1" else site)
    )
    with pytest.raises(SiteError, match=r"resid_post\.0 to be what enters layer 1"):
        verify_sites(gemma)


def test_nan_weights_are_noticed(tmp_path, tiny_tokenizer):
    folder = tmp_path / "nan"
    model = make("Qwen2", folder, tiny_tokenizer).model
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[3, 4] = torch.nan
    model.save_pretrained(folder)
    with pytest.raises(NumericsError, match="not finite"):
        load_model(folder)


def test_an_unknown_architecture_is_a_site_error():
    stranger = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 5))
    stranger.config = SimpleNamespace(model_type="stranger")
    with pytest.raises(SiteError, match="not understood"):
        SiteMap(stranger, object(), "stranger")
