"""The layers above a site, against whole forward passes of transformers with hooks of our own."""

from __future__ import annotations

import pytest
import torch

from helpers import assert_close, assert_not_close, randomize
from pair_fixture import adapt, fine_tune, lora
from palimpsest.errors import SiteError
from palimpsest.models import UpperHalf, load_model, load_pair
from palimpsest.models.sites import Tap
from palimpsest.options import ModelOptions

LAYERS, D_MODEL, VOCAB, VARIANTS = 3, 32, 320, 3
COMMON = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "vocab_size": VOCAB}
LLAMA_LIKE = {
    "hidden_size": D_MODEL,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
} | COMMON
GROUPED = {"num_key_value_heads": 2, **LLAMA_LIKE}
GEMMA = {
    "head_dim": 8,
    "query_pre_attn_scalar": 8,
    "sliding_window": 4,
    "attn_logit_softcapping": 5.0,
    "final_logit_softcapping": 2.5,
}
FAMILIES = {
    "Llama": ("LlamaConfig", GROUPED),
    "Qwen2": ("Qwen2Config", GROUPED),
    "Gemma2": ("Gemma2Config", GEMMA | GROUPED),
    "GPT2": ("GPT2Config", {"n_embd": D_MODEL, "n_layer": LAYERS, "n_head": 4, "n_positions": 64, **COMMON}),
    "GPTNeoX": ("GPTNeoXConfig", LLAMA_LIKE),
}
SITES = {"resid_post.0": 1, "resid_post.1": 2, "resid_post.2": 3, "resid_pre.0": 0, "resid_pre.2": 2}


def make(family, folder, tokenizer):
    import transformers

    name, fields = FAMILIES[family]
    config = getattr(transformers, name)(**fields)
    config._attn_implementation = "eager"  # the only one that knows Gemma's soft caps
    model = transformers.AutoModelForCausalLM.from_config(config)
    randomize(model, seed=5)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return load_model(folder)


@pytest.fixture(scope="module", params=FAMILIES)
def model(request, tmp_path_factory, tiny_tokenizer):
    return make(request.param, tmp_path_factory.mktemp(request.param), tiny_tokenizer)


@pytest.fixture(scope="module")
def llama(tiny_llama):
    return load_model(tiny_llama(num_hidden_layers=LAYERS))


@pytest.fixture
def ids():
    return torch.randint(3, VOCAB, (2, 11), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def hidden():
    return torch.randn(VARIANTS * 2, 11, D_MODEL, generator=torch.Generator().manual_seed(2))


def decoder_layers(model):
    decoder = model.model.base_model
    return decoder.h if hasattr(decoder, "h") else decoder.layers


def state(model):
    """Hooks and patched forwards that hang on any module."""
    return [
        (len(one._forward_hooks), len(one._forward_pre_hooks), vars(one).get("forward"))
        for one in model.model.modules()
    ]


@torch.no_grad()
def logits_with(model, ids, site, hidden):
    """The whole model on each variant by itself, with a hook that puts `hidden` in."""
    point, layer = site.split(".")
    module = decoder_layers(model)[int(layer)]
    found = []
    for variant in hidden.view(VARIANTS, *ids.shape, -1):
        if point == "resid_post":
            handle = module.register_forward_hook(lambda _m, _i, _o, variant=variant: variant)
        else:
            handle = module.register_forward_pre_hook(
                lambda _m, args, kwargs, variant=variant: ((variant, *args[1:]), kwargs), with_kwargs=True
            )
        found.append(model.model(input_ids=ids, use_cache=False).logits)
        handle.remove()
    return torch.cat(found)


@pytest.mark.parametrize("site", SITES)
def test_it_is_the_model_above_the_site(model, site, ids, hidden):
    before = state(model)
    upper = UpperHalf(model, site)
    assert upper.bypassed == SITES[site]
    with torch.no_grad():
        head_input = upper.run(ids, hidden)
        logits = model.sites.head.logits(head_input.flatten(0, 1)).view(*head_input.shape[:2], -1)
    expected = logits_with(model, ids, site, hidden)
    assert_close(logits, expected, rtol=1e-4, atol=1e-5)
    assert_not_close(expected[:2], expected[2:4])
    assert state(model) == before


@pytest.mark.parametrize("site", ["resid_post.1", "mlp_out.1"])
def test_its_own_activations_give_its_own_head_input(model, site, ids):
    upper = UpperHalf(model, site)
    own = model.read(ids, [site], head=True)
    with torch.inference_mode():
        assert_close(upper.run(ids, own.acts[site]), own.head_input, rtol=1e-5, atol=1e-5)
    assert upper.bypassed == (2 if site.startswith("resid") else 0)


def test_gradients_are_those_of_finite_differences(llama, ids, hidden):
    upper, weight = UpperHalf(llama, "resid_post.0"), torch.randn(2, 11, D_MODEL)
    point = hidden[:2].clone().requires_grad_()
    (gradient,) = torch.autograd.grad((weight * upper.run(ids, point)).sum(), point)
    step = torch.zeros_like(point)
    step[1, 3] = 0.02 * gradient[1, 3] / gradient[1, 3].norm()
    with torch.no_grad():
        ends = [(weight * upper.run(ids, point + sign * step)).double().sum() for sign in (1, -1)]
    assert_close((gradient * step).sum(), (ends[0] - ends[1]).float() / 2, rtol=2e-3)
    assert gradient[0].abs().amax(1).min() > 0


def test_skipped_layers_do_not_run(llama, ids, hidden):
    upper = UpperHalf(llama, "resid_post.1")
    ran = []
    for index, layer in enumerate(decoder_layers(llama)):
        layer.mlp.register_forward_hook(lambda *_, index=index: ran.append(index))
    try:
        with torch.no_grad():
            upper.run(ids, hidden)
        assert ran == [2]
    finally:
        for layer in decoder_layers(llama):
            layer.mlp._forward_hooks.clear()


def test_an_error_leaves_nothing_behind(llama, ids, hidden, monkeypatch):
    upper, before = UpperHalf(llama, "resid_post.1"), state(llama)

    def fail(*_args, **_kwargs):
        raise RuntimeError("stop")

    monkeypatch.setattr(llama.sites.final_norm, "forward", fail)
    with pytest.raises(RuntimeError, match="stop"):
        upper.run(ids, hidden)
    monkeypatch.undo()
    assert state(llama) == before


def test_a_forward_that_was_patched_before_comes_back(llama, ids, hidden):
    layer = decoder_layers(llama)[0]
    patched = layer.forward  # accelerate leaves a forward of its own on the instance
    layer.forward = patched
    try:
        with torch.no_grad():
            UpperHalf(llama, "resid_post.1").run(ids, hidden)
        assert vars(layer)["forward"] is patched
    finally:
        del layer.forward


def test_layers_that_cannot_be_skipped_run(llama, ids, monkeypatch):
    """A later layer that reads what an earlier one left behind, as layers with shared keys and values do."""
    first, last = decoder_layers(llama)[0], decoder_layers(llama)[2]
    left = {}
    monkeypatch.setattr(first.mlp, "forward", _leaving(first.mlp.forward, left))
    monkeypatch.setattr(last.mlp, "forward", _taking(last.mlp.forward, left))
    upper = UpperHalf(llama, "resid_post.1")
    assert upper.bypassed == 0
    own = llama.read(ids, ["resid_post.1"], head=True)
    with torch.inference_mode():
        assert_close(upper.run(ids, own.acts["resid_post.1"]), own.head_input)


def _leaving(inner, left):
    def forward(x):
        left["out"] = inner(x)
        return left["out"]

    return forward


def _taking(inner, left):
    return lambda x: inner(x) + left.pop("out")


def test_layers_that_return_tuples_are_imitated(llama, ids, hidden, monkeypatch):
    with torch.no_grad():
        expected = UpperHalf(llama, "resid_post.0").run(ids, hidden)
    for layer in decoder_layers(llama):
        inner = layer.forward
        monkeypatch.setattr(
            layer, "forward", lambda hidden, inner=inner, **rest: (inner(_only(hidden), **rest), None, None)
        )
    norm = llama.sites.final_norm.forward
    monkeypatch.setattr(llama.sites.final_norm, "forward", lambda hidden: norm(_only(hidden)))
    second = decoder_layers(llama)[1].forward
    monkeypatch.setattr(decoder_layers(llama)[1], "forward", lambda three, **rest: second(_of(three), **rest))
    upper = UpperHalf(llama, "resid_post.0")
    assert upper.bypassed == 1
    with torch.no_grad():
        assert torch.equal(upper.run(ids, hidden), expected)


def _of(three):
    """What a model does that unpacks its layers' outputs; a bare tensor fails."""
    hidden, *rest = three
    assert rest == [None, None]
    return hidden


def _only(hidden):
    return hidden[0] if isinstance(hidden, tuple) else hidden


def test_an_adapter_is_the_merged_model(tiny_llama, tiny_tokenizer, tmp_path, ids, hidden):
    base = tiny_llama(num_hidden_layers=LAYERS)
    merged = adapt(base, tmp_path / "adapter", lora()).merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    tiny_tokenizer.save_pretrained(tmp_path / "merged")
    pairs = [load_pair(base, tmp_path / name) for name in ("adapter", "merged")]
    with torch.inference_mode():
        for side in ("base", "tuned"):
            found = [UpperHalf(pair.side(side), "resid_post.0").run(ids, hidden) for pair in pairs]
            assert_close(found[0], found[1], rtol=1e-4, atol=1e-5)
        assert_not_close(found[0], UpperHalf(pairs[0].base, "resid_post.0").run(ids, hidden))


def test_another_models_activations_go_through_this_model(tiny_llama, tiny_tokenizer, tmp_path, ids):
    base = tiny_llama(num_hidden_layers=LAYERS)
    pair = load_pair(base, fine_tune(base, tmp_path / "tuned", tiny_tokenizer))
    acts = pair.base.read(ids, ["resid_post.50%"]).acts["resid_post.50%"]
    upper = UpperHalf(pair.tuned, "resid_post.50%")
    assert upper.site == "resid_post.1" and upper.bypassed == 2
    with torch.inference_mode():
        found = upper.run(ids, acts)
    assert_not_close(found, pair.tuned.read(ids, [], head=True).head_input)
    assert_not_close(found, pair.base.read(ids, [], head=True).head_input)


def test_bfloat16_is_checked_with_its_own_precision(tiny_llama, ids, hidden):
    model = load_model(tiny_llama(num_hidden_layers=LAYERS), ModelOptions(dtype="bfloat16", device="cpu"))
    upper = UpperHalf(model, "resid_post.1")
    assert upper.bypassed == 2
    with torch.inference_mode():
        assert upper.run(ids, hidden).dtype == torch.bfloat16


def test_a_site_that_is_only_reported_or_not_there_is_refused(llama, monkeypatch):
    with pytest.raises(SiteError, match="no site"):
        UpperHalf(llama, "resid_post.9")
    tap = Tap(decoder_layers(llama)[0], "output:1")
    monkeypatch.setattr(type(llama.sites), "tap", lambda *_: tap)
    with pytest.raises(SiteError, match="Nothing can be put in"):
        UpperHalf(llama, "resid_post.0")
