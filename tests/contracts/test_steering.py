"""Steering is the closed-form edit, of every view and rule, with and without a cache, and leaves nothing behind."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from helpers import assert_close, assert_not_close
from latent_world import D_MODEL, LATENTS, dictionary
from pair_fixture import adapt, fine_tune, lora
from palimpsest.errors import ConfigError, DictionaryError, NumericsError, PairError, SiteError
from palimpsest.interpret.steering.changes import Change, read_changes
from palimpsest.interpret.steering.steerer import Steerer
from palimpsest.interpret.subject import subject_from
from palimpsest.models import SIDES, load_model, load_pair, replace
from palimpsest.options import ModelOptions

SITE = "resid_post.1"
MODELS = ModelOptions(device="cpu", tokens_per_batch=512)
MODES = {"add": 1.5, "scale": 3.0, "clamp": 2.0, "ablate": None}
SAES = ("relu", "topk", "batch_topk", "jumprelu", "gated")


def make(activation="topk", view="base", **extra):
    return dictionary(activation, seed=7, view=view, models=2 if view == "pair" else 1, **extra)


@pytest.fixture(scope="module")
def world(tmp_path_factory, tiny_llama, tiny_tokenizer):
    root = tmp_path_factory.mktemp("steering")
    base = tiny_llama(seed=3, num_hidden_layers=3)
    found = SimpleNamespace(root=root, base=base, tokenizer=tiny_tokenizer)
    found.tuned = fine_tune(base, root / "tuned", tiny_tokenizer)
    found.pair = load_pair(base, found.tuned, MODELS)
    return found


@pytest.fixture(scope="module")
def adapters(world):
    """A LoRA and a latent adapter on the base, each a pair of one set of weights."""
    from palimpsest.tune.adapter import LatentConfig

    dictionary(seed=11).save_pretrained(world.root / "dictionary")
    adapt(world.base, world.root / "lora", lora())
    latent = LatentConfig(target_hooks=[(str(world.root / "dictionary"), SITE)])
    adapt(world.base, world.root / "latent", latent, scale=0.5)
    return {name: load_pair(world.base, world.root / name, MODELS) for name in ("lora", "latent")}


def steerer(source, made):
    return Steerer(subject_from(source, made, SITE))


@pytest.fixture
def ids():
    """Two sequences behind a BOS, the second one padded."""
    made = torch.randint(3, 320, (2, 12), generator=torch.Generator().manual_seed(1))
    made[:, 0], made[1, -3:] = 1, 0
    return made


def special(ids):
    return ids <= 2


def both(pair, ids):
    """The site's activations of base and tuned, in float64."""
    return [pair.side(side).read(ids, [SITE]).acts[SITE].double() for side in SIDES]


def normalised(x, kind):
    if kind == "layer_norm":
        scale = x.std(-1, keepdim=True)
        return (x - x.mean(-1, keepdim=True)) / (scale + 1e-5), scale
    scale = x.square().mean(-1, keepdim=True).sqrt()
    return x / scale, scale


def dense(made, x):
    """Codes by the definition, for `x` [tokens, models, d_model]."""
    if made.apply_b_dec_to_input:
        x = x - made.b_dec.double()
    pre = torch.einsum("tmd,mdl->tl", x, made.W_enc.double())
    if made.activation == "gated":
        opened = pre + made.b_gate.double() > 0
        return opened * (pre * made.r_mag.double().exp() + made.b_mag.double()).relu()
    pre = pre + made.b_enc.double()
    if made.activation == "topk":
        best = pre.topk(int(made.k), dim=1).indices
        return torch.zeros_like(pre).scatter_(1, best, pre.gather(1, best).relu())
    threshold = 0.0 if made.threshold is None else made.threshold.double()
    return pre.relu() * (pre > threshold)


def closed_form(made, side, changes, base, tuned):
    """h + (f(z) - z) W_dec by the definition; every token."""
    place = SIDES.index(side)
    own = (base, tuned)[place]
    flat = [one.reshape(-1, D_MODEL) for one in (base, tuned)]
    if made.view == "pair":
        x = torch.stack(flat, 1)
    else:
        x = (flat[1] - flat[0] if made.view == "diff" else flat[place])[:, None]
    scale = torch.ones(len(x), x.shape[1], 1, dtype=torch.float64)
    if made.input_norm:
        x, scale = normalised(x, made.input_norm)
    written = place if made.view == "pair" else 0
    z = dense(made, x)
    new = z.clone()
    for one in changes:
        column = new[:, one.latent]
        new[:, one.latent] = {
            "add": column + (one.value or 0),
            "scale": column * (1 if one.value is None else one.value),
            "clamp": torch.full_like(column, one.value or 0),
            "ablate": torch.zeros_like(column),
        }[one.mode]
    delta = (new - z) @ made.W_dec[:, written].double() * scale[:, written]
    return own + delta.view(own.shape), z


def some_changes(mode, z):
    """Changes of latents that fire on some tokens and not on all; of every mode at once, or of one."""
    rate = (z > 0).double().mean(0)
    latents = [int(one) for one in ((rate - 0.4).abs()).argsort()[:4]]
    assert all(0 < rate[one] < 1 for one in latents)
    modes = MODES if mode == "all" else {mode: MODES[mode]}
    made = [
        Change(latent, name, value) for latent, (name, value) in zip(latents, modes.items(), strict=False)
    ]  # type: ignore[arg-type]
    return [*made, Change(latents[3], "scale", 0.5)] if mode != "all" else made


def check(world, pair, made, side, mode, ids):
    base, tuned = both(pair, ids)
    _, z = closed_form(made, side, (), base, tuned)
    changes = some_changes(mode, z)
    expected, _ = closed_form(made, side, changes, base, tuned)
    own = (base, tuned)[SIDES.index(side)]
    expected = torch.where(special(ids)[..., None], own, expected)
    assert_not_close(expected[~special(ids)], own[~special(ids)], atol=1e-2)
    tool = steerer(pair, made)
    with tool.steering(side, changes) as model:
        found = model.read(ids, [SITE], head=True)
    assert_close(found.acts[SITE], expected.float(), rtol=1e-4, atol=1e-4)
    assert torch.equal(found.acts[SITE][special(ids)], own[special(ids)].float())
    with replace(model.sites, SITE, lambda hidden: expected.to(hidden.dtype)):
        above = pair.side(side).read(ids, [], head=True)
    assert_close(found.head_input[ids != 0], above.head_input[ids != 0], rtol=1e-3, atol=1e-3)
    assert torch.equal(pair.side(side).read(ids, [SITE]).acts[SITE], own.float())


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize(
    ("activation", "mode"), [*(("topk", one) for one in MODES), *((one, "all") for one in SAES)]
)
def test_an_sae_on_either_model(world, ids, activation, side, mode):
    check(world, world.pair, make(activation), side, mode, ids)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize(
    ("view", "activation", "mode"),
    [
        *(("pair", "topk", one) for one in (*MODES, "all")),
        ("pair", "batch_topk", "all"),
        ("diff", "jumprelu", "scale"),
        ("diff", "jumprelu", "all"),
    ],
)
def test_joint_codes_read_both_models(world, ids, view, activation, side, mode):
    check(world, world.pair, make(activation, view), side, mode, ids)


@pytest.mark.parametrize("norm", ["layer_norm", "unit_rms"])
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("view", ["base", "pair", "diff"])
def test_a_normalised_input_is_written_back_at_its_scale(world, ids, view, side, norm):
    for mode in ("add", "all"):
        check(world, world.pair, make("topk", view, input_norm=norm), side, mode, ids)


@pytest.mark.parametrize("site", ["resid_pre.0", "mlp_out.1", "attn_out.2", "resid_pre.2"])
def test_any_site_that_can_be_written(world, ids, site):
    made = make("relu", "pair")
    pair = world.pair
    base, tuned = (pair.side(side).read(ids, [site]).acts[site].double() for side in SIDES)
    changes = [Change(3, "clamp", 2.0), Change(5, "add", -1.0)]
    expected, _ = closed_form(made, "tuned", changes, base, tuned)
    expected = torch.where(special(ids)[..., None], tuned, expected)
    with Steerer(subject_from(pair, made, site)).steering("tuned", changes) as model:
        assert_close(model.read(ids, [site]).acts[site], expected.float(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("view", ["base", "pair"])
def test_half_precision_activations_are_edited_in_float32(world, ids, view, tmp_path):
    pair = load_pair(world.base, world.tuned, ModelOptions(device="cpu", dtype="bfloat16"))
    made = make("relu", view)
    base, tuned = both(pair, ids)
    changes = [Change(4, "add", 0.37), Change(6, "scale", 2.5)]
    expected, _ = closed_form(made, "tuned", changes, base, tuned)
    expected = torch.where(special(ids)[..., None], tuned, expected)
    with steerer(pair, made).steering("tuned", changes) as model:
        found = model.read(ids, [SITE]).acts[SITE]
    assert found.dtype == torch.bfloat16
    assert_close(found.float(), expected.bfloat16().float(), rtol=1e-2, atol=1e-2)
    assert ((found.double() - expected).abs() <= 0.0041 * expected.abs() + 1e-6).all(), "one rounding"


@pytest.mark.parametrize("changes", [(), "9:scale=1", "9:add=0", ["9:scale=1", "4:add=0"]])
@pytest.mark.parametrize("view", ["base", "pair", "diff"])
def test_no_change_is_the_model_to_the_last_bit(world, ids, view, changes):
    tool = steerer(world.pair, make("topk", view))
    for side in SIDES:
        expected = world.pair.side(side).read(ids, [SITE, "resid_post.2"], head=True)
        with tool.steering(side, changes) as model:
            found = model.read(ids, [SITE, "resid_post.2"], head=True)
        assert all(torch.equal(found.acts[key], expected.acts[key]) for key in found.acts)
        assert torch.equal(found.head_input, expected.head_input)


def test_the_change_of_a_silent_latent(world, ids):
    made = make("relu")
    with torch.no_grad():
        made.b_enc[5] = -1e4
    tool = steerer(world.pair, made)
    own = world.pair.base.read(ids, [SITE]).acts[SITE]
    for change in ("5:scale=100", "5:ablate"):
        with tool.steering("base", change) as model:
            assert torch.equal(model.read(ids, [SITE]).acts[SITE], own)
    with tool.steering("base", "5:add=2") as model:
        added = model.read(ids, [SITE]).acts[SITE] - own
    assert_close(added[0, 1], 2 * made.W_dec[5, 0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("view", ["base", "pair"])
def test_nothing_before_the_first_edited_token_changes(world, ids, view):
    tool, made = steerer(world.pair, make("topk", view)), 6
    before = world.pair.tuned.read(ids, [], head=True).head_input
    with tool.steering("tuned", "3:add=9", tokens="generated", prompt_length=made) as model:
        after = model.read(ids, [], head=True).head_input
    assert torch.equal(after[:, :made], before[:, :made])
    assert_not_close(after[0, made:], before[0, made:], atol=1e-2)
    with tool.steering("tuned", "3:add=9", tokens="prompt", prompt_length=made) as model:
        acts = model.read(ids, [SITE]).acts[SITE]
    own = world.pair.tuned.read(ids, [SITE]).acts[SITE]
    assert torch.equal(acts[:, made:], own[:, made:]) and not torch.equal(acts[:, :made], own[:, :made])


@torch.inference_mode()
def written_slowly(tool, side, changes, prompt, count, tokens="all"):
    """Greedy ids by whole forward passes of both models and the closed form."""
    pair, made, ids = tool.subject.source, tool.subject.dictionary, list(prompt)
    for _ in range(count):
        row = torch.tensor([ids])
        base, tuned = both(pair, row)
        own = (base, tuned)[SIDES.index(side)]
        edited = ~special(row)
        after = torch.arange(len(ids)) >= len(prompt)
        edited = edited & (after if tokens == "generated" else ~after if tokens == "prompt" else True)
        new = torch.where(edited[..., None], closed_form(made, side, changes, base, tuned)[0], own)
        model = pair.side(side)
        with replace(model.sites, SITE, lambda hidden, new=new: new.to(hidden.dtype)):
            head = model.read(row, [], head=True).head_input
        ids.append(int(model.head.logits(head[0, -1:])[0].argmax()))
        if ids[-1] == 2:
            break
    return ids[len(prompt) :]


@pytest.mark.parametrize("tokens", ["all", "generated", "prompt"])
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("view", ["base", "pair", "diff"])
def test_generation_with_and_without_a_cache(world, view, side, tokens):
    tool = steerer(world.pair, make("topk", view))
    prompt = [1, *range(40, 48)]
    base, tuned = both(world.pair, torch.tensor([prompt]))
    changes = some_changes("all", closed_form(tool.subject.dictionary, side, (), base, tuned)[1])
    row = torch.tensor([prompt])
    found = []
    for cached in (True, False):
        with tool.steering(side, changes, tokens=tokens, prompt_length=len(prompt)) as model:
            made: Any = model.model.generate(
                row,
                attention_mask=torch.ones_like(row),
                do_sample=False,
                max_new_tokens=10,
                use_cache=cached,
                output_logits=True,
                return_dict_in_generate=True,
                pad_token_id=0,
            )
        found.append(made)
    assert torch.equal(found[0].sequences, found[1].sequences)
    for one, other in zip(found[0].logits, found[1].logits, strict=True):
        assert_close(one, other, rtol=1e-3, atol=1e-3)
    assert found[0].sequences[0, len(prompt) :].tolist() == written_slowly(
        tool, side, changes, prompt, 10, tokens
    )


def test_left_padded_prompts_are_written_as_if_alone(world):
    tool = steerer(world.pair, make("topk", "pair"))
    short, long = [1, 50, 51, 52], [1, *range(60, 67)]
    padded = torch.tensor([[0] * 4 + short, long])
    mask = torch.tensor([[0] * 4 + [1] * 4, [1] * 8])
    options = {"do_sample": False, "max_new_tokens": 6, "pad_token_id": 0}
    with tool.steering("tuned", ["3:clamp=3", "8:scale=2"]) as model:
        together = model.model.generate(padded, attention_mask=mask, **options)[:, 8:]
        for row, alone in zip(together, (short, long), strict=True):
            ids = torch.tensor([alone])
            expected = model.model.generate(ids, attention_mask=torch.ones_like(ids), **options)
            assert row.tolist()[:3] == expected[0, len(alone) :].tolist()[:3]


def test_text_is_deterministic_by_seed_and_the_random_state_is_left_alone(world):
    import numpy as np

    tool = steerer(world.pair, make())
    torch.manual_seed(5)
    states = torch.get_rng_state(), np.random.get_state()[1].tolist()
    texts = [
        tool.generate("the mill", "tuned", "3:add=1", temperature=1.0, seed=seed, max_new_tokens=20)
        for seed in (1, 1, 2)
    ]
    assert texts[0] == texts[1] != texts[2]
    tool.generate("the mill", max_new_tokens=4)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert np.random.get_state()[1].tolist() == states[1]


def test_side_by_side(world):
    tool = steerer(world.pair, make("topk", "pair"))
    found = tool.compare("the mill", ["3:clamp=30"], max_new_tokens=12)
    assert found.side == "tuned" and found.changes == [{"latent": 3, "mode": "clamp", "value": 30.0}]
    assert found.base == tool.generate("the mill", "base", max_new_tokens=12)
    assert found.tuned == tool.generate("the mill", max_new_tokens=12)
    assert found.steered == tool.generate("the mill", "tuned", "3:clamp=30", max_new_tokens=12) != found.tuned
    same = tool.compare("the mill", (), "base", max_new_tokens=12)
    assert same.steered == same.base and same.unsteered == same.base
    lone = Steerer(subject_from(load_model(world.base, MODELS), make(), SITE))
    alone = lone.compare("the mill", "3:clamp=30", max_new_tokens=12)
    assert alone.tuned is None and alone.side == "base" and alone.base == found.base
    assert "3:clamp=30" in alone._repr_html_()


def test_pieces_are_the_text_and_whole_characters(world, monkeypatch):
    tool, pieces = steerer(world.pair, make()), []
    text = tool.generate("the mill é 漢", temperature=1.0, seed=3, max_new_tokens=40, on_token=pieces.append)
    assert "".join(pieces) == text and len(pieces) > 3
    ids = tool.subject.tokenizer("漢字é", add_special_tokens=False)["input_ids"]
    from palimpsest.interpret.steering.generate import _Pieces

    pieces.clear()
    stream = _Pieces(tool.subject.tokenizer, {2}, pieces.append)
    stream.put(torch.tensor([[1, 5]]))
    for one in ids:
        stream.put(torch.tensor([one]))
    stream.end()
    assert pieces == ["漢", "字", "é"] and len(ids) > 3


def hooks(model):
    return sum(len(one._forward_hooks) + len(one._forward_pre_hooks) for one in model.modules())


@pytest.mark.parametrize("view", ["base", "pair"])
def test_hooks_come_off_whatever_happens(world, ids, view):
    made = make("topk", view)
    made.W_dec.data[5] = 100.0
    tool = steerer(world.pair, made)
    models = [world.pair.side(side).model for side in SIDES]
    before = [hooks(one) for one in models]

    def stop(_piece):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tool.generate("the mill", "tuned", "3:scale=4", on_token=stop)
    with (
        pytest.raises(ZeroDivisionError),
        tool.steering("base", "3:scale=4"),
        tool.steering("tuned", "4:ablate"),
    ):
        raise ZeroDivisionError
    with pytest.raises(ConfigError, match="tokens"), tool.steering("tuned", "3:scale=4") as model:
        model.model(inputs_embeds=torch.zeros(1, 3, D_MODEL))
    with pytest.raises(NumericsError, match="smaller"), tool.steering("tuned", "5:add=1e38") as model:
        model.read(ids, [SITE])
    assert [hooks(one) for one in models] == before
    assert not any(one.training for one in models)


def test_nested_blocks_edit_one_after_the_other_each_in_its_model(world, ids):
    made = make("relu")
    tool = steerer(world.pair, made)
    own = world.pair.base.read(ids, [SITE]).acts[SITE].double()
    first, _ = closed_form(made, "base", [Change(3, "add", 4.0)], own, own)
    second, _ = closed_form(made, "base", [Change(5, "scale", 3.0)], first, first)
    tuned = world.pair.tuned.read(ids, [SITE]).acts[SITE]
    with tool.steering("base", "3:add=4"):
        with tool.steering("base", "5:scale=3") as model:
            found = model.read(ids, [SITE]).acts[SITE]
            assert torch.equal(world.pair.tuned.read(ids, [SITE]).acts[SITE], tuned)
        again = world.pair.base.read(ids, [SITE]).acts[SITE]
    expected = torch.where(special(ids)[..., None], own, second)
    assert_close(found, expected.float(), rtol=1e-4, atol=1e-4)
    assert_close(again, torch.where(special(ids)[..., None], own, first).float(), rtol=1e-4, atol=1e-4)


def test_companions_read_the_other_model_unsteered_also_when_both_are_steered(world, ids):
    made = make("topk", "pair")
    tool = steerer(world.pair, made)
    base, tuned = both(world.pair, ids)
    change = some_changes("scale", closed_form(made, "base", (), base, tuned)[1])
    with tool.steering("base", change) as one, tool.steering("tuned", change) as other:
        found = one.read(ids, [SITE]).acts[SITE], other.read(ids, [SITE]).acts[SITE]
    for side, acts, own in zip(SIDES, found, (base, tuned), strict=True):
        expected = torch.where(special(ids)[..., None], own, closed_form(made, side, change, base, tuned)[0])
        assert_close(acts, expected.float(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("view", "mode"), [("base", "all"), ("pair", "add"), ("pair", "all"), ("diff", "all")]
)
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("kind", ["lora", "latent"])
def test_adapter_pairs_switch_one_set_of_weights(world, adapters, ids, kind, side, view, mode):
    pair = adapters[kind]
    plain = [one.clone() for one in both(pair, ids)]
    assert not torch.equal(*plain)
    check(world, pair, make("topk", view), side, mode, ids)
    assert all(torch.equal(one, other) for one, other in zip(both(pair, ids), plain, strict=True))


@pytest.mark.parametrize("kind", ["lora", "latent"])
def test_an_adapter_pair_writes_what_two_models_would(world, adapters, kind):
    pair, made = adapters[kind], make("topk", "pair")
    tool = steerer(pair, made)
    prompt = [1, *range(40, 48)]
    for side in SIDES:
        base, tuned = both(pair, torch.tensor([prompt]))
        changes = some_changes("all", closed_form(made, side, (), base, tuned)[1])
        row = torch.tensor([prompt])
        with tool.steering(side, changes) as model:
            found = model.model.generate(
                row, attention_mask=torch.ones_like(row), do_sample=False, max_new_tokens=6, pad_token_id=0
            )
        assert found[0, len(prompt) :].tolist() == written_slowly(tool, side, changes, prompt, 6)


@pytest.mark.parametrize("kind", ["lora", "latent"])
def test_both_sides_of_an_adapter_pair_are_steered_apart(adapters, ids, kind):
    pair, made = adapters[kind], make("relu")
    tool = steerer(pair, made)
    base, tuned = both(pair, ids)
    with tool.steering("base", "3:add=4"):
        with tool.steering("tuned", "5:add=7"):
            inside = both(pair, ids)
        only = both(pair, ids)
    row = (~special(ids)).double()[..., None]
    by_base, by_tuned = (row * value * made.W_dec[latent, 0].double() for latent, value in ((3, 4), (5, 7)))
    assert_close(inside[0], base + by_base, rtol=1e-4, atol=1e-4)
    assert_close(inside[1], tuned + by_tuned, rtol=1e-4, atol=1e-4)
    assert_close(only[0], base + by_base, rtol=1e-4, atol=1e-4)
    assert torch.equal(only[1], tuned)


def test_the_prompt_is_chat_or_text_and_must_fit(world):
    from palimpsest.interpret.steering.generate import encode_prompt

    model, tokenizer = world.pair.base, world.tokenizer
    assert encode_prompt(model, "the mill")[0] == tokenizer.bos_token_id
    chat = tokenizer.decode(encode_prompt(model, "the mill", chat=True))
    assert chat == "<s><|user|>\nthe mill</s>\n<|assistant|>\n"
    with pytest.raises(ConfigError, match="no room"):
        encode_prompt(model, "river " * 600)
    tool = steerer(world.pair, make())
    count = len(tokenizer("zzzzzzzzzz" * 50, add_special_tokens=False)["input_ids"])
    filled = tool.generate("z" * (511 - count + 490), max_new_tokens=100)
    assert len(tokenizer(filled, add_special_tokens=False)["input_ids"]) <= 30
    lone = load_model(world.base, MODELS)
    lone.tokenizer = type(tokenizer)(tokenizer_object=tokenizer.backend_tokenizer, eos_token="</s>")
    with pytest.raises(ConfigError, match="empty"):
        encode_prompt(lone, "")
    with pytest.raises(ConfigError, match="chat template"):
        encode_prompt(lone, "hello", chat=True)


def test_rules_of_a_checkpoint_are_no_part_of_the_comparison(world, monkeypatch):
    tool = steerer(world.pair, make())
    options: Any = {"max_new_tokens": 20, "seed": 3}
    plain = [tool.generate("the mill", "base", **options, temperature=heat) for heat in (0.0, 1.5)]
    own = world.pair.base.model.generation_config
    rules = {"no_repeat_ngram_size": 1, "min_p": 0.9, "typical_p": 0.1, "suppress_tokens": list(range(300))}
    for name, value in rules.items():
        monkeypatch.setattr(own, name, value)
    found = [tool.generate("the mill", "base", **options, temperature=heat) for heat in (0.0, 1.5)]
    assert found == plain and world.pair.base.model.generation_config is own


def test_writing_ends_at_the_end_of_the_sequence(world):
    made = make("relu")
    head = world.pair.base.model.get_output_embeddings().weight
    tool = steerer(world.pair, made)
    with torch.no_grad():
        made.W_dec[5, 0] = head[2] / head[2].norm() ** 2
    assert tool.generate("the mill", "base", "5:add=1e4", tokens="all", max_new_tokens=30) == ""


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("x:scale=2", "no change"),
        ("-1:scale=2", "no change"),
        ("3", "no change"),
        ("3:scale", "needs a value"),
        ("3:zero", "There is no change 'zero'"),
        ("3:ablate=1", "takes no value"),
        ("3:add=nan", "no number that a model"),
        ("3:clamp=inf", "no number that a model"),
        ("3:add=1e39", "no number that a model"),
        ("9" * 5000 + ":ablate", "no change"),
        ("3:add=four", "no number"),
        (["3:add=1", "3:scale=2"], "changed twice"),
        (["0:ablate", "0:scale=2"], "changed twice"),
        (f"{LATENTS}:ablate", f"no latent {LATENTS}"),
    ],
)
def test_what_is_no_change_is_refused(world, text, words):
    tool = steerer(world.pair, make())
    with pytest.raises(ConfigError, match=words), tool.steering("base", text):
        pytest.fail("it was accepted")


def test_no_number_is_too_long_to_be_refused():
    with pytest.raises(ConfigError, match="no number that a model"):
        Change(3, "add", 10**400)
    with pytest.raises(ConfigError, match="no number that a model"):
        Change(3, "add", 10**5000)


def test_changes_are_read_as_they_are_written():
    for text in ("123:scale=4", "17:ablate", "5:add=-3.25", "9:clamp=10", "0:add=1e-07"):
        assert str(Change.parse(text)) == text and Change.parse(
            f" {text.replace('=', ' = ')} "
        ) == Change.parse(text)
    assert [str(Change.parse("5:add=3").at(s)) for s in (0, 1, 2)] == ["5:add=0", "5:add=3", "5:add=6"]
    assert [str(Change.parse("5:scale=3").at(s)) for s in (0, 0.5, 2)] == [
        "5:scale=1",
        "5:scale=2",
        "5:scale=5",
    ]
    assert [str(Change.parse("5:ablate").at(s)) for s in (0, 0.5, 1)] == [
        "5:scale=1",
        "5:scale=0.5",
        "5:ablate",
    ]
    assert str(Change.parse("5:clamp=3").at(2)) == "5:clamp=6"
    assert read_changes(["1:ablate", Change(2, "add", 1)], 3) == (Change(1, "ablate"), Change(2, "add", 1))
    with pytest.raises(ConfigError, match="whole number"):
        Change(True, "ablate")


def test_other_faults_are_refused(world, ids):
    tool = steerer(world.pair, make())
    for options in ({"tokens": "generated"}, {"tokens": "prompt"}):
        with pytest.raises(ConfigError, match="prompt end"), tool.steering("base", "3:ablate", **options):
            pytest.fail("it was accepted")
    for decoding in (
        {"temperature": -1.0},
        {"temperature": float("nan")},
        {"max_new_tokens": 0},
        {"seed": -1},
    ):
        with pytest.raises(ConfigError):
            tool.generate("a", **decoding)
    with pytest.raises(DictionaryError, match="width"):
        from palimpsest.dictionaries import Dictionary

        steerer(world.pair, Dictionary(D_MODEL + 1, 40, k=4))
    with pytest.raises(SiteError):
        Steerer(subject_from(world.pair, make(), "resid_post.9"))
    lone = Steerer(subject_from(load_model(world.base, MODELS), make(), SITE))
    with pytest.raises(ConfigError, match="no tuned"):
        lone.generate("a", "tuned", "3:ablate")
    with pytest.raises(ConfigError, match="two models"):
        Steerer(subject_from(load_model(world.base, MODELS), make("topk", "pair"), SITE)).generate(
            "a", "base", "3:ablate"
        )
    single = load_pair(world.base, world.tuned, ModelOptions(device="cpu", one_at_a_time=True))
    with pytest.raises(PairError, match="at once"):
        steerer(single, make("topk", "diff")).generate("a", "tuned", "3:ablate")
    assert steerer(single, make()).compare("a", "3:add=2", max_new_tokens=3).tuned is not None
    joint = steerer(world.pair, make("topk", "pair"))
    cache = world.pair.tuned.model(ids, use_cache=True).past_key_values
    with pytest.raises(ConfigError, match="beginning"), joint.steering("tuned", "3:ablate") as model:
        model.model(ids[:, :1], past_key_values=cache, use_cache=True)


def test_a_site_that_is_only_reported_cannot_be_steered(world, monkeypatch):
    subject = subject_from(world.pair, make(), SITE)
    tap = type(world.pair.base.sites).tap
    monkeypatch.setattr(
        type(world.pair.base.sites), "tap", lambda self, site: tap(self, site)._replace(side="output:1")
    )
    with pytest.raises(SiteError, match="only reports"):
        Steerer(subject)
