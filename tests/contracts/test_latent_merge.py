"""Constant vectors merged into biases: exact, saved with the model, and taken out again to the bit."""

from __future__ import annotations

import copy

import pytest
import torch

from helpers import assert_close, assert_not_close, randomize
from palimpsest.errors import ConfigError
from palimpsest.models import SiteMap, replace
from palimpsest.tune.adapter.merge import bias_place, check_place, merge_vector, unmerge_vector

D_MODEL, VOCAB = 32, 40
SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": D_MODEL,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
GROUPED = SHAPE | {"num_key_value_heads": 2, "head_dim": 8}
MERGES = [
    *[(kind, site) for kind in ("gpt2", "gpt_neox") for site in ("resid_post.1", "mlp_out.2", "attn_out.0")],
    *[("llama", site) for site in ("resid_post.1", "mlp_out_post.2", "attn_out_post.0")],
    ("qwen3", "attn_out.1"),
    ("gemma2", "attn_out.1"),
]
REFUSED = [
    ("qwen2", "resid_post.1", "no bias in down_proj"),
    ("qwen2", "attn_out.1", "no bias in o_proj"),
    ("gemma2", "resid_post.1", "norms what a sublayer writes"),
    ("gemma2", "mlp_out_post.1", "norms what a sublayer writes"),
    ("gemma2", "attn_out_post.1", "norms what a sublayer writes"),
    ("gemma2", "mlp_out.1", "no bias in down_proj"),
    ("llama", "resid_pre.1", "no bias adds to it"),
    ("llama", "resid_post.3", "3 layers"),
    ("opt", "resid_post.1", "opt"),
]


def tiny(kind, seed=0):
    """A random model of a family, every parameter drawn anew."""
    import transformers as t

    made = {
        "gpt2": lambda: t.GPT2LMHeadModel(
            t.GPT2Config(
                vocab_size=VOCAB,
                n_embd=D_MODEL,
                n_layer=3,
                n_head=4,
                n_positions=64,
                bos_token_id=1,
                eos_token_id=2,
            )
        ),
        "gpt_neox": lambda: t.GPTNeoXForCausalLM(t.GPTNeoXConfig(**SHAPE)),
        "llama": lambda: t.LlamaForCausalLM(t.LlamaConfig(**GROUPED)),
        "qwen2": lambda: t.Qwen2ForCausalLM(t.Qwen2Config(**SHAPE, num_key_value_heads=2)),
        "qwen3": lambda: t.Qwen3ForCausalLM(t.Qwen3Config(**GROUPED)),
        "gemma2": lambda: t.Gemma2ForCausalLM(
            t.Gemma2Config(**GROUPED, query_pre_attn_scalar=8, attn_implementation="eager")
        ),
        "opt": lambda: t.OPTForCausalLM(
            t.OPTConfig(
                vocab_size=VOCAB, hidden_size=D_MODEL, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4
            )
        ),
    }[kind]()
    randomize(made, seed=seed)
    return made.eval()


def ids(batch=2, length=9):
    return torch.randint(3, VOCAB, (batch, length), generator=torch.Generator().manual_seed(3))


def vector(seed=5, scale=1.0):
    return scale * torch.randn(D_MODEL, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits(model):
    return model(input_ids=ids()).logits


def edited_logits(model, site, added):
    """What a hook at the site gives, which is what an adapter of a constant vector computes."""
    with replace(SiteMap(model, object(), "tiny"), site, lambda hidden: hidden + added):
        return logits(model)


@torch.no_grad()
def written(model):
    return model.generate(ids(), max_new_tokens=6, do_sample=False, pad_token_id=0)


@pytest.mark.parametrize(("kind", "site"), MERGES)
def test_a_merged_vector_is_the_edit_of_its_site_and_survives_saving(kind, site, tmp_path):
    model, v = tiny(kind), vector()
    plain, expected = logits(model), edited_logits(model, site, v)
    with replace(SiteMap(model, object(), "tiny"), site, lambda hidden: hidden + v):
        told = written(model)
    assert_not_close(expected, plain, atol=1e-2)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    merge_vector(model, site, v)
    assert_close(logits(model), expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(written(model), told)
    model.save_pretrained(tmp_path)
    again, report = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert torch.equal(logits(again.eval()), logits(model))
    assert torch.equal(written(again), told)
    changed = [
        name
        for name, now in model.named_parameters()
        if name in before and not torch.equal(now, before[name])
    ]
    assert len(changed) <= 1 and all(name.endswith(".bias") for name in changed)
    added = {name: now for name, now in model.named_parameters() if name not in before}
    assert sum(bool(one.any()) for one in added.values()) + len(changed) == 1


@pytest.mark.parametrize(("kind", "site"), MERGES)
def test_unmerging_restores_the_model_to_the_bit(kind, site):
    model = tiny(kind)
    before, config, plain = copy.deepcopy(model.state_dict()), model.config.to_dict(), logits(model)
    merge_vector(model, site, vector())
    merge_vector(model, site, vector(6))
    unmerge_vector(model, site, vector())
    assert_close(logits(model), edited_logits(tiny(kind), site, vector(6)), rtol=1e-4, atol=1e-5)
    unmerge_vector(model, site, vector(6))
    after = model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)
    assert model.config.to_dict() == config
    assert torch.equal(logits(model), plain)


def test_several_sites_of_one_model_in_any_order(tmp_path):
    sites = {
        "resid_post.0": vector(1),
        "resid_post.2": vector(2),
        "mlp_out.2": vector(3),
        "attn_out.1": vector(4),
    }
    model, engine = tiny("llama"), tiny("llama")
    for site, v in sites.items():
        merge_vector(model, site, v)
    made = SiteMap(engine, object(), "tiny")
    from contextlib import ExitStack

    with ExitStack() as stack:
        for site, v in sites.items():
            stack.enter_context(replace(made, site, lambda hidden, v=v: hidden + v))
        expected = logits(engine)
    assert_close(logits(model), expected, rtol=1e-4, atol=1e-5)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(type(model).from_pretrained(tmp_path).eval()), logits(model))
    for site, v in sites.items():
        unmerge_vector(model, site, v)
    assert torch.equal(logits(model), logits(tiny("llama")))
    assert not model.config.mlp_bias and not model.config.attention_bias
    assert not [name for name, _ in model.named_parameters() if name.endswith(".bias")]


def test_a_half_precision_model_keeps_its_type():
    model, v = tiny("llama").to(torch.bfloat16), vector()
    merge_vector(model, "resid_post.1", v)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert torch.equal(model.model.layers[1].mlp.down_proj.bias, v.to(torch.bfloat16))


def test_a_vector_of_zeros_changes_nothing():
    model = tiny("gpt2")
    plain = logits(model)
    merge_vector(model, "resid_post.1", torch.zeros(D_MODEL))
    assert torch.equal(logits(model), plain)


def test_the_place_is_found_below_adapters():
    from peft import LoraConfig, get_peft_model

    model = tiny("llama")
    get_peft_model(model, LoraConfig(r=2, target_modules=["down_proj"]))
    merge_vector(model, "resid_post.1", vector())
    assert bias_place(model, "resid_post.1").path == "model.layers.1.mlp.down_proj"
    assert_close(logits(model), edited_logits(tiny("llama"), "resid_post.1", vector()), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("kind", "site", "words"), REFUSED)
def test_what_has_no_place_is_refused_and_left_alone(kind, site, words):
    model = tiny(kind)
    plain, config = logits(model), model.config.to_dict()
    with pytest.raises(ConfigError, match=words):
        merge_vector(model, site, vector())
    assert torch.equal(logits(model), plain) and model.config.to_dict() == config


def test_wrong_vectors_and_names():
    model = tiny("llama")
    with pytest.raises(ConfigError, match="Expected: 32 numbers"):
        merge_vector(model, "resid_post.1", torch.ones(31))
    assert not model.config.mlp_bias
    with pytest.raises(ConfigError, match="not merged"):
        unmerge_vector(model, "resid_post.1", vector())
    merge_vector(model, "resid_post.1", vector())
    for site, v in (("resid_post.1", vector(6)), ("mlp_out.1", vector()), ("resid_post.2", vector())):
        with pytest.raises(ConfigError, match="not merged"):
            unmerge_vector(model, site, v)
    merge_vector(model, "resid_post.1", vector())
    assert_close(model.model.layers[1].mlp.down_proj.bias, 2 * vector())


@pytest.mark.parametrize(("kind", "site", "words"), REFUSED)
def test_a_check_beforehand_says_the_same(kind, site, words):
    with pytest.raises(ConfigError, match=words):
        check_place(tiny(kind), site)
    check_place(tiny("gpt2"), "resid_post.1")


def adapted(kind, component, sites, **options):
    """A model with a trained constant adapter, through peft."""
    from peft import get_peft_model

    from palimpsest.dictionaries import Dictionary
    from palimpsest.tune.adapter import LatentConfig, latent_layers

    torch.manual_seed(2)
    hooks = [(Dictionary(D_MODEL, 48, activation="topk", k=4), site) for site in sites]
    model = get_peft_model(
        tiny(kind), LatentConfig(target_hooks=hooks, component=component, **options)
    ).eval()
    for layer in latent_layers(model):
        randomize(layer.latent_components, seed=8, scale=0.3)
    return model


@pytest.mark.parametrize("component", ["bias", "vector"])
@pytest.mark.parametrize(
    ("kind", "sites"),
    [
        ("gpt2", ["resid_post.0", "attn_out.2"]),
        ("gpt_neox", ["resid_post.1", "mlp_out.1"]),
        ("llama", ["resid_post.0", "attn_out_post.1", "mlp_out.2"]),
    ],
)
def test_peft_merges_unmerges_and_unloads(component, kind, sites, tmp_path):
    model = adapted(kind, component, sites, skip_ids=[])
    tuned, told = logits(model), written(model)
    plain = logits(tiny(kind))
    assert_not_close(tuned, plain, atol=1e-2)
    model.merge_adapter()
    assert_close(logits(model), tuned, rtol=1e-4, atol=1e-5)
    model.unmerge_adapter()
    assert torch.equal(logits(model), tuned)
    with model.disable_adapter():
        assert torch.equal(logits(model), plain)
    merged = model.merge_and_unload()
    assert type(merged) is type(tiny(kind))
    assert_close(logits(merged), tuned, rtol=1e-4, atol=1e-5)
    assert torch.equal(written(merged), told)
    merged.save_pretrained(tmp_path)
    assert torch.equal(logits(type(merged).from_pretrained(tmp_path).eval()), logits(merged))


@pytest.mark.parametrize(
    ("kind", "component", "site", "options", "words"),
    [
        ("llama", "scale", "resid_post.0", {"skip_ids": []}, "depends on the token"),
        ("llama", "bias", "resid_post.0", {}, "some tokens only"),
        ("llama", "bias", "resid_post.0", {"skip_ids": [], "scope": "answer"}, "some tokens only"),
        ("gemma2", "bias", "resid_post.0", {"skip_ids": []}, "norms what a sublayer writes"),
        ("qwen2", "vector", "resid_post.0", {"skip_ids": []}, "no bias in down_proj"),
    ],
)
def test_peft_refuses_to_merge_what_would_be_something_else(kind, component, site, options, words):
    model = adapted(kind, component, [site], **options)
    before = {name: one.clone() for name, one in model.named_parameters()}
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ConfigError, match=words):
            merge()
    after = dict(model.named_parameters())
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)
