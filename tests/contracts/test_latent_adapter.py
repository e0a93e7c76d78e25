"""What peft asks of a method: identity when new, off is off, only its own numbers move, saved is loaded."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftConfig, PeftModel, get_peft_model

from latent_world import ARCHITECTURES, KINDS, LATENTS, adapted, config, dictionary, shift, tiny, tokens
from palimpsest.errors import ConfigError, DictionaryError, PairError, SiteError
from palimpsest.tune.adapter import LatentConfig, latent_layers

IDS = tokens()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_new_is_the_base_and_off_is_the_base(name, kind, dtype):
    base = tiny(name, dtype)
    expected = base(IDS).logits
    sites = [
        (dictionary(seed=0), "resid_post.1"),
        (dictionary(seed=1), "mlp_out.1"),
        (dictionary(seed=2), "attn_out.2"),
    ]
    model = adapted(kind, *sites, base=base)
    assert torch.equal(model(IDS).logits, expected)
    shift(model, 0.3)
    assert not torch.equal(model(IDS).logits, expected)
    with model.disable_adapter():
        assert torch.equal(model(IDS).logits, expected)
    assert {one.dtype for one in model.parameters() if one.requires_grad} == {torch.float32}
    left = model.unload()
    assert torch.equal(left(IDS).logits, expected)
    assert not latent_layers(left)
    assert not left._forward_pre_hooks
    assert type(left) is type(base)


@pytest.mark.parametrize("kind", KINDS)
def test_only_its_own_numbers_move_and_all_of_them_can(kind):
    model = adapted(kind).train()
    before = {name: one.detach().clone() for name, one in model.named_parameters()}
    optimiser = torch.optim.SGD([one for one in model.parameters() if one.requires_grad], lr=0.1)
    for _ in range(2):  # what hangs behind a zero has its gradient after the first step
        optimiser.zero_grad()
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimiser.step()
    moved = {name for name, one in model.named_parameters() if not torch.equal(one, before[name])}
    own = {name for name, one in model.named_parameters() if one.requires_grad}
    assert own == moved
    assert all("latent_" in name for name in own)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_saved_is_loaded(name, kind, tmp_path):
    sites = [(dictionary(seed=0), "resid_post.1"), (dictionary(seed=1), "mlp_out.1")]
    model = adapted(kind, *sites, base=tiny(name), move=0.3)
    expected = model(IDS).logits
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny(name), tmp_path)
    assert torch.equal(again(IDS).logits, expected)
    assert not any(one.requires_grad for one in again.parameters())
    trainable = PeftModel.from_pretrained(tiny(name), tmp_path, is_trainable=True)
    assert any(one.requires_grad for one in trainable.parameters())
    weights = (tmp_path / "adapter_model.safetensors").stat().st_size
    assert weights < 4 * sum(one.numel() for one in model.parameters() if one.requires_grad) + 2000


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_side_by_side(kind):
    model = adapted(kind, move=0.3)
    first = model(IDS).logits
    model.add_adapter("second", config(kind))
    assert torch.equal(model(IDS).logits, first)
    model.set_adapter("second")
    shift(model, 0.2, seed=9)
    second = model(IDS).logits
    assert not torch.equal(first, second)
    model.set_adapter("default")
    assert torch.equal(model(IDS).logits, first)
    model.delete_adapter("second")
    assert torch.equal(model(IDS).logits, first)
    assert len({id(one.dictionary) for one in latent_layers(model)}) == 1


def test_two_active_adapters_add_up():
    model = adapted("active-bias", move=0.3)
    model.add_adapter("second", config("active-bias"))
    layer = latent_layers(model)[0]
    with torch.no_grad():
        layer.components["second"].weight.copy_(layer.components["default"].weight)
    model.base_model.set_adapter(["default", "second"])
    both = model(IDS).logits
    model.base_model.set_adapter("default")
    with torch.no_grad():
        layer.components["default"].weight.mul_(2)
    torch.testing.assert_close(model(IDS).logits, both, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_generation_with_a_cache_is_generation_without(name):
    model = adapted("scale", base=tiny(name), move=0.5)
    kept = model.generate(input_ids=IDS, max_new_tokens=6, do_sample=False)
    plain = model.generate(input_ids=IDS, max_new_tokens=6, do_sample=False, use_cache=False)
    assert torch.equal(kept, plain)
    with model.disable_adapter():
        base = model.generate(input_ids=IDS, max_new_tokens=6, do_sample=False)
    assert torch.equal(base, tiny(name).generate(input_ids=IDS, max_new_tokens=6, do_sample=False))


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_changes_no_gradient(reentrant):
    def gradients(checkpointing: bool) -> list[torch.Tensor]:
        model = adapted(
            "scale", (dictionary(), "resid_post.1"), (dictionary(seed=1), "mlp_out.2"), move=0.2
        ).train()
        if checkpointing:
            model.enable_input_require_grads()
            model.get_base_model().activation_checkpointing_enable({"use_reentrant": reentrant})
        model(input_ids=IDS, labels=IDS).loss.backward()
        return [one.grad for one in model.parameters() if one.requires_grad]

    for found, expected in zip(gradients(True), gradients(False), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)


def test_the_backward_pass_stops_below_the_lowest_adapter():
    def reached(**changes: object) -> bool:
        model = adapted("scale", (dictionary(), "resid_post.1"), move=0.2, **changes).train()
        seen: list[torch.Tensor] = []
        embeddings = model.get_input_embeddings()
        embeddings.register_forward_hook(
            lambda m, a, out: out.requires_grad_(True).register_hook(seen.append) and None
        )
        model(input_ids=IDS, labels=IDS).loss.backward()
        return bool(seen)

    assert not reached()
    assert reached(stop_gradient=False)


def test_mixed_precision_keeps_the_edit_in_float32():
    torch.manual_seed(0)
    model = adapted("scale", base=tiny(dtype=torch.bfloat16))
    layer = latent_layers(model)[0]
    with torch.no_grad():
        layer.components["default"].weight.fill_(1e-3)
    seen = []
    layer.watchers.append(lambda one: seen.append(one))
    with torch.autocast("cpu", torch.bfloat16):
        model(IDS)
    edit, values = seen[0].edit.entries, seen[0].codes.values
    assert edit.dtype == torch.float32
    torch.testing.assert_close(edit, 1e-3 * values, rtol=1e-6, atol=0)
    # The naive way, in the model's own type, does nothing at all.
    low = values.bfloat16()
    assert not torch.any((torch.tensor(1 + 1e-3).bfloat16() * low) - low)


def test_the_automatic_class_loads_it(tmp_path):
    tiny().save_pretrained(tmp_path / "base")
    model = adapted("scale", base=tiny(), move=0.3)
    model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    model.save_pretrained(tmp_path / "adapter")
    again = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert torch.equal(again(IDS).logits, model(IDS).logits)
    assert isinstance(PeftConfig.from_pretrained(tmp_path / "adapter"), LatentConfig)


def test_a_copy_of_the_model_is_a_model_of_its_own():
    model = adapted("scale", move=0.3, skip_ids=None)
    expected = model(IDS).logits
    other = copy.deepcopy(model)
    model(tokens(3, 4))
    assert torch.equal(other(IDS).logits, expected)
    shift(other, 0.5, seed=2)
    assert torch.equal(model(IDS).logits, expected)


def test_a_dictionary_on_disk_is_recorded_and_another_is_refused(tmp_path):
    right, wrong = dictionary(seed=0, metadata={"site": "resid_post.1"}), dictionary(seed=1)
    right.save_pretrained(tmp_path / "right")
    wrong.save_pretrained(tmp_path / "wrong")
    model = get_peft_model(tiny(), LatentConfig(target_hooks=str(tmp_path / "right")))
    shift(model, 0.3)
    model.save_pretrained(tmp_path / "adapter")
    text = (tmp_path / "adapter" / "adapter_config.json").read_text()
    assert json.loads(text)["target_hooks"] == [[str(tmp_path / "right"), "resid_post.1"]]
    assert len(json.loads(text)["hashes"]["resid_post.1"]) == 64
    (tmp_path / "right").rename(tmp_path / "moved")
    (tmp_path / "wrong").rename(tmp_path / "right")
    with pytest.raises(DictionaryError, match="another one than the adapter was trained with"):
        PeftModel.from_pretrained(tiny(), tmp_path / "adapter")
    loaded = PeftConfig.from_pretrained(tmp_path / "adapter")
    loaded.target_hooks = [[str(tmp_path / "moved"), "resid_post.1"]]
    again = PeftModel.from_pretrained(tiny(), tmp_path / "adapter", config=loaded)
    assert torch.equal(again(IDS).logits, model.eval()(IDS).logits)


def test_paths_are_also_looked_for_beside_the_adapter(tmp_path, monkeypatch):
    dictionary().save_pretrained(tmp_path / "d")
    monkeypatch.chdir(tmp_path)
    model = get_peft_model(tiny(), LatentConfig(target_hooks=[("d", "resid_post.1")])).eval()
    shift(model, 0.3)
    model.save_pretrained(tmp_path / "adapter")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    again = PeftModel.from_pretrained(tiny(), tmp_path / "adapter")
    assert torch.equal(again(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize("activation", ["relu", "batch_topk", "jumprelu", "gated", "topk"])
@pytest.mark.parametrize("norm", [None, "layer_norm"])
def test_every_kind_of_dictionary(activation, norm):
    extra = {} if norm is None else {"input_norm": norm}
    made = dictionary(activation, **extra)
    model = adapted("scale", (made, "resid_post.1"), move=0.5, skip_ids=[])
    assert torch.isfinite(model(IDS).logits).all()
    layer = latent_layers(model)[0]
    hidden = torch.randn(2, 5, 32)
    flat = hidden.view(-1, 32)
    codes = made.encode(flat)
    dense = codes.dense()
    # dec(f(z)) + error, with the bias that cancels, is the prototype's way.
    from dataclasses import replace

    scaled = replace(
        codes, values=codes.values * (1 + layer.components["default"].weight.detach()[codes.indices])
    )
    expected = made.decode(scaled) + (flat - made.decode(codes))
    torch.testing.assert_close(layer.edit(hidden, ["default"]).view(-1, 32), expected, rtol=1e-4, atol=1e-5)
    assert dense.shape == (10, LATENTS)


def test_lists_of_latents():
    model = adapted("active-bias", latents={"resid_post.1": [3, 5, 8]}, forbid=[5])
    component = latent_layers(model)[0].components["default"]
    assert component.latents.tolist() == [3, 8]
    assert component.weight.shape == (2,)
    whole = adapted("active-bias")
    with torch.no_grad():
        component.weight.copy_(torch.tensor([0.7, -0.4]))
        latent_layers(whole)[0].components["default"].weight[[3, 8]] = torch.tensor([0.7, -0.4])
    torch.testing.assert_close(model(IDS).logits, whole(IDS).logits, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "vector"])
def test_a_restricted_component_does_what_a_mask_does(kind):
    model = adapted(kind, move=0.4, skip_ids=[])
    layer = latent_layers(model)[0]
    wanted = torch.tensor([2, 7, 30, 31, 90])
    mask = torch.zeros(LATENTS)
    mask[wanted] = 1
    layer.masks["default"] = mask
    expected = model(IDS).logits
    del layer.masks["default"]
    assert not torch.equal(model(IDS).logits, expected)
    layer.latent_components["default"] = layer.components["default"].restricted(wanted)
    torch.testing.assert_close(model(IDS).logits, expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(KeyError, match="latent 3 "):
        layer.components["default"].restricted(torch.tensor([2, 3]))


@pytest.mark.parametrize(
    ("changes", "error", "text"),
    [
        ({"component": "scales"}, ConfigError, "Unknown component.*scale"),
        ({"transform": "exp", "component": "bias"}, ConfigError, "no transform"),
        ({"rank": 4}, ConfigError, "rank belongs to"),
        ({"scope": "middle"}, ConfigError, "Unknown scope"),
        ({"target_hooks": []}, ConfigError, "needs a dictionary"),
        ({"target_hooks": [("d", "resid_post.1", 3)]}, ConfigError, "pairs"),
    ],
)
def test_configurations_that_are_none(changes, error, text):
    with pytest.raises(error, match=text):
        LatentConfig(**({"target_hooks": [(dictionary(), "resid_post.1")], "component": "scale"} | changes))


@pytest.mark.parametrize(
    ("hook", "changes", "error", "text"),
    [
        ((dictionary(), "resid_post.7"), {}, SiteError, "has no site"),
        ((dictionary(), "resid_mid.1"), {}, SiteError, "would not reach"),
        ((dictionary(), None), {}, DictionaryError, "does not say where"),
        ((dictionary(), "resid_post.1"), {"latents": [96]}, DictionaryError, "no such latents"),
        ((dictionary(), "resid_post.1"), {"latents": {"resid_post.2": [1]}}, ConfigError, "does not edit"),
        ((dictionary(), "resid_post.1"), {"component": "low-rank", "rank": 48}, ConfigError, "quadratic"),
        ((dictionary(view="diff"), "resid_post.1"), {}, DictionaryError, "one model"),
        (
            (dictionary(), "resid_post.1"),
            {"hashes": {"resid_post.1": "0" * 64}},
            DictionaryError,
            "another one",
        ),
        (("nowhere/at-all", "resid_post.1"), {}, DictionaryError, "nowhere"),
    ],
)
def test_adapters_that_fit_no_model(hook, changes, error, text):
    with pytest.raises(error, match=text):
        get_peft_model(tiny(), LatentConfig(target_hooks=[hook], **changes))


def test_another_width_is_refused():
    from palimpsest.dictionaries import Dictionary

    with pytest.raises(DictionaryError, match="another width"):
        get_peft_model(tiny(), LatentConfig(target_hooks=[(Dictionary(16, 40, k=4), "resid_post.1")]))


def test_merging_what_is_not_constant_is_refused_and_changes_nothing():
    model = adapted("scale", move=0.3)
    before = model(IDS).logits
    with pytest.raises(ConfigError, match="depends on the token|some tokens only"):
        model.merge_and_unload()
    assert torch.equal(model(IDS).logits, before)


@pytest.mark.parametrize(
    ("inside", "around"), [("mlp_out.1", "resid_post.1"), ("resid_pre.0", "resid_post.0")]
)
def test_a_file_fits_whatever_other_adapters_stand_around(inside, around, tmp_path):
    """A wrapper around a layer moves what is inside of it to another path of the model."""
    alone = adapted("scale", (dictionary(seed=1), inside), move=0.5)
    alone.save_pretrained(tmp_path / "alone")
    expected = alone(IDS).logits
    other = adapted("scale", (dictionary(), around), move=0.5)
    other.load_adapter(tmp_path / "alone", "inside")
    other.set_adapter("inside")
    assert torch.equal(other(IDS).logits, expected)
    other.save_pretrained(tmp_path / "both", selected_adapters=["inside"])
    again = PeftModel.from_pretrained(tiny(), tmp_path / "both" / "inside")
    assert torch.equal(again(IDS).logits, expected)


def test_a_file_without_the_numbers_is_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    model = adapted("lerp", move=0.5)
    model.save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    tensors.pop(next(iter(tensors)))
    save_file(tensors, path)
    with pytest.raises(PairError, match="does not hold the numbers"):
        PeftModel.from_pretrained(tiny(), tmp_path)


def test_switched_off_is_the_base_when_merged():
    base = tiny("GPT2")
    expected = base(IDS).logits
    model = adapted("bias", base=base, move=0.5, skip_ids=[])
    tuned = model(IDS).logits
    model.merge_adapter()
    torch.testing.assert_close(model(IDS).logits, tuned, rtol=1e-4, atol=1e-4)
    with model.disable_adapter():
        assert torch.equal(model(IDS).logits, expected)
    assert torch.equal(model(IDS).logits, tuned)


def test_what_was_merged_is_taken_out_although_the_numbers_moved():
    base = tiny("GPT2")
    expected = base(IDS).logits
    model = adapted("bias", base=base, move=0.5, skip_ids=[])
    model.merge_adapter()
    shift(model, 0.3, seed=8)
    model.unmerge_adapter()
    with model.disable_adapter():
        assert torch.equal(model(IDS).logits, expected)


def test_a_second_merge_starts_from_what_the_model_is_then():
    merged = adapted("bias", base=tiny("GPT2"), move=0.5, skip_ids=[]).merge_and_unload()
    with torch.no_grad():
        merged.transformer.h[1].mlp.c_proj.bias += 1.0
    expected = merged(IDS).logits
    again = get_peft_model(merged, config("bias", skip_ids=[])).eval().merge_and_unload()
    assert torch.equal(again(IDS).logits, expected)


def test_merging_asks_about_the_adapters_that_are_named():
    model = adapted("bias", base=tiny("GPT2"), move=0.5, skip_ids=[])
    model.add_adapter("second", config("scale", skip_ids=[]))
    before = model(IDS).logits
    with pytest.raises(ConfigError, match="depends on the token"):
        model.merge_adapter(["default", "second"])
    assert torch.equal(model(IDS).logits, before)
    model.merge_adapter(["default"])
    torch.testing.assert_close(model(IDS).logits, before, rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings(
    "ignore:You are trying to modify a model with PEFT for a second time", "ignore:Already found a"
)
def test_a_refused_adapter_leaves_the_model_as_it_was():
    base = tiny()
    expected = base(IDS).logits
    with pytest.raises(ConfigError, match="Two dictionaries at one place"):
        get_peft_model(
            base, config("scale", (dictionary(), "mlp_out.1"), (dictionary(seed=1), "mlp_out_post.1"))
        )
    assert not latent_layers(base)
    assert not base._forward_pre_hooks
    model = get_peft_model(base, config("scale")).eval()
    assert torch.equal(model(IDS).logits, expected)
    with pytest.raises(DictionaryError, match="no such latents"):
        model.add_adapter("second", config("scale", latents=[4000]))
    model.add_adapter("second", config("scale", latents=[4]))
    with pytest.raises(ConfigError, match="already has an adapter called 'default'"):
        get_peft_model(model.get_base_model(), config("scale"))


def test_a_bias_needs_a_dictionary_that_normalises_nothing():
    with pytest.raises(ConfigError, match="is no constant"):
        adapted("bias", (dictionary(input_norm="layer_norm"), "resid_post.1"))


def test_the_tokens_that_are_left_alone_travel_with_the_adapter(tmp_path):
    ids = IDS.clone()
    ids[:, 4] = 0
    model = adapted("active-bias", move=0.5)
    model.save_pretrained(tmp_path)
    base = tiny()
    base.config.pad_token_id = base.generation_config.pad_token_id = 7
    again = PeftModel.from_pretrained(base, tmp_path)
    assert again.peft_config["default"].skip_ids == [0, 1]
    assert torch.equal(again(ids).logits, model(ids).logits)


def test_loading_without_memory_for_a_copy(tmp_path):
    model = adapted("scale", move=0.5, latents=[3, 8, 20])
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny(), tmp_path, low_cpu_mem_usage=True)
    assert torch.equal(again(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"latents": [1.9, 3]}, "whole numbers"),
        ({"latents": ["a"]}, "whole numbers"),
        ({"component": "vector", "latents": [1]}, "knows no latents"),
    ],
)
def test_lists_that_are_none(changes, text):
    with pytest.raises(ConfigError, match=text):
        adapted(changes.pop("component", "scale"), **changes)


def test_lists_may_name_sites_as_the_hooks_do():
    hook = (dictionary(), "blocks.1.hook_resid_post")
    model = adapted("scale", hook, latents={"blocks.1.hook_resid_post": [3]})
    assert latent_layers(model)[0].components["default"].latents.tolist() == [3]
    assert model.peft_config["default"].latents == {"resid_post.1": [3]}


def test_a_constant_is_written_again_when_its_numbers_change():
    model = adapted("bias", move=0.5)
    with torch.no_grad():
        model(IDS)
        component = latent_layers(model)[0].components["default"]
        component.weight.data.mul_(2)  # no version counter tells of this
        found = model(IDS).logits
    torch.testing.assert_close(found, model(IDS).logits.detach())
