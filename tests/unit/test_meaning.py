"""The logit lens against a direct computation, for families that keep their norms differently; a text of one's own."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers

import pair_fixture
from helpers import randomize
from palimpsest.dictionaries import Dictionary
from palimpsest.errors import ConfigError
from palimpsest.interpret.examples import ExamplesConfig, run_examples
from palimpsest.interpret.examples.vocabulary import token_texts
from palimpsest.interpret.lens import Lens, can_read, lens_table, norm_gain
from palimpsest.interpret.subject import open_subject, subject_from
from palimpsest.interpret.text_reading import LONGEST, read_text
from palimpsest.latents import LatentIndex
from palimpsest.models import load_model, load_pair
from palimpsest.options import ModelOptions, RunOptions

CPU = ModelOptions(device="cpu")
SITE = "resid_post.0"


def near(found, expected, rtol=1e-4, atol=1e-5):
    np.testing.assert_allclose(np.asarray(found, float), np.asarray(expected, float), rtol=rtol, atol=atol)


def dictionary_of(view="base", width=32, n=24, seed=0):
    torch.manual_seed(seed)
    models = 2 if view == "pair" else 1
    k = 5.0 if view == "pair" else 5
    activation = "batch_topk" if view == "pair" else "topk"
    made = Dictionary(width, n, activation=activation, k=k, models=models, view=view, metadata={"site": SITE})
    with torch.no_grad():
        made.W_dec.copy_(torch.randn(made.W_dec.shape))
        if made.threshold is not None:
            made.threshold.fill_(0.2)
    return made


@pytest.fixture(scope="module")
def pair(tiny_llama, tiny_tokenizer, tmp_path_factory):
    tuned = pair_fixture.fine_tune(tiny_llama(), tmp_path_factory.mktemp("lens") / "tuned", tiny_tokenizer)
    return load_pair(tiny_llama(), tuned, CPU)


def family(name, folder, tokenizer):
    """A small model: GPT-2 (LayerNorm), Gemma 2 (1 + w, softcap) or Cohere (LayerNorm, a multiplier)."""
    import transformers

    shape = {"vocab_size": len(tokenizer) + 8, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    small = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    if name == "gpt2":
        config = transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=64, **shape)
        model = transformers.GPT2LMHeadModel(config)
    elif name == "gemma2":
        config = transformers.Gemma2Config(**small, num_key_value_heads=2, head_dim=8, **shape)
        model = transformers.Gemma2ForCausalLM(config)
    else:
        config = transformers.CohereConfig(**small, num_key_value_heads=2, logit_scale=0.25, **shape)
        model = transformers.CohereForCausalLM(config)
    randomize(model, seed=4)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return load_model(folder, CPU)


@pytest.mark.parametrize("name", ["gpt2", "gemma2", "cohere"])
def test_the_lens_follows_the_models_own_norm_and_head(name, tmp_path, tiny_tokenizer):
    model = family(name, tmp_path / name, tiny_tokenizer)
    gain, centres = norm_gain(model)
    norm = model.sites.final_norm
    weight = norm.weight.detach()
    near(gain, 1 + weight if name == "gemma2" else weight, rtol=1e-3)
    assert centres == (name != "gemma2")
    vocab = len(tiny_tokenizer)
    lens = Lens(model, vocab)
    rows = torch.randn(6, 32)
    assert lens.vocab == vocab
    # A direction added to a residual moves the head's input by the norm's own derivative, up to the division: with a
    # residual of mean 0 and size 1 that is orthogonal to the direction, the division stays as it is to first order.
    residual = torch.randn(32, dtype=torch.float64)
    residual = residual - residual.mean()
    rows = rows - rows.mean(1, keepdim=True)
    rows = rows - (rows @ residual.float())[:, None] * residual.float() / residual.square().sum().float()
    residual = (residual / residual.square().mean().sqrt()).float()
    step = 1e-2
    with torch.no_grad():
        moved, start = (norm(one) for one in (residual + step * rows, residual[None] - step * rows))
        logits = (model.sites.head.module(moved) - model.sites.head.module(start))[:, :vocab] / (2 * step)
        logits = logits * (model.sites.head.multiplier or 1.0)
    near(
        lens.logits(rows),
        logits - logits.mean(1, keepdim=True),
        rtol=2e-2,
        atol=2e-2 * float(logits.abs().max()),
    )


def direct(model, rows, vocab):
    weight = model.model.model.norm.weight.detach()
    logits = (rows * weight) @ model.model.lm_head.weight.detach()[:vocab].T
    return logits - logits.mean(1, keepdim=True)


@pytest.mark.parametrize("view", ["base", "pair", "diff"])
def test_the_table_names_the_ends_of_the_direct_computation(pair, view, tiny_tokenizer):
    dictionary = dictionary_of(view)
    subject, vocab = subject_from(pair, dictionary), len(tiny_tokenizer)
    chosen = torch.tensor([0, 3, 17, 23])
    table = lens_table(subject, chosen, vocab, top=4)
    logits = {
        side: direct(
            pair.side(side), dictionary.W_dec.detach()[chosen, place if view == "pair" else 0], vocab
        )
        for place, side in enumerate(("base", "tuned"))
    }
    for side, one in logits.items():
        for found, sign in ((table.promoted[side], 1), (table.suppressed[side], -1)):
            expected = (sign * one).topk(4)
            near(found[1], sign * expected.values)
            assert found[0].tolist() == expected.indices.tolist()
    change = logits["tuned"] - logits["base"]
    expected = change.abs().topk(4).indices
    assert table.changed is not None
    assert table.changed[0].tolist() == expected.tolist()
    near(table.changed[1], change.gather(1, expected))


def test_pieces_of_the_table_are_the_table(pair, monkeypatch):
    from palimpsest.interpret import lens as module

    subject = subject_from(pair, dictionary_of(n=40))
    whole = lens_table(subject, torch.arange(40), 300)
    monkeypatch.setattr(module, "LOGIT_BYTES", 1)
    cut = lens_table(subject, torch.arange(40), 300)
    near(cut.promoted["tuned"][1], whole.promoted["tuned"][1])
    assert cut.suppressed["base"][0].tolist() == whole.suppressed["base"][0].tolist()


def test_heads_of_different_length_are_centred_alike(tiny_llama, tiny_tokenizer, tmp_path):
    """The tuned model has tokens that the base has not, with large logits; of the shared ones nothing changed."""
    base = tiny_llama(tie_word_embeddings=False)
    tuned = transformers.AutoModelForCausalLM.from_pretrained(base)
    size = tuned.config.vocab_size
    tuned.resize_token_embeddings(size + 8, mean_resizing=False)
    with torch.no_grad():
        tuned.lm_head.weight[size:] = 50.0 * torch.randn(8, 32)
    tuned.save_pretrained(tmp_path / "tuned")
    tiny_tokenizer.save_pretrained(tmp_path / "tuned")
    subject = subject_from(load_pair(base, tmp_path / "tuned", CPU), dictionary_of())
    table = lens_table(subject, torch.arange(24), size + 8)
    assert table.changed is not None
    near(table.changed[1], torch.zeros(24, 10))
    near(table.promoted["tuned"][1], table.promoted["base"][1])


def test_an_adapter_keeps_both_heads_apart(tiny_llama, tmp_path):
    config = pair_fixture.lora(target_modules=["q_proj", "lm_head"])
    merged = pair_fixture.adapt(tiny_llama(tie_word_embeddings=False), tmp_path / "lora", config)
    adapted = load_pair(tiny_llama(tie_word_embeddings=False), tmp_path / "lora", CPU)
    dictionary = dictionary_of()
    table = lens_table(subject_from(adapted, dictionary), torch.arange(24), 300, top=3)
    rows = dictionary.W_dec.detach()[:, 0]
    inner = merged.get_base_model()
    with torch.no_grad():
        tuned = inner.lm_head(rows * inner.model.norm.weight)[:, :300]
        with merged.disable_adapter():
            base = inner.lm_head(rows * inner.model.norm.weight)[:, :300]
    for side, one in (("base", base), ("tuned", tuned)):
        near(table.promoted[side][1], (one - one.mean(1, keepdim=True)).topk(3).values)
    assert float((tuned - base).abs().max()) > 1e-2


def test_no_lens_where_the_dictionary_is_not_in_the_residual_stream(pair):
    dictionary = dictionary_of(width=64)
    dictionary.metadata["site"] = "mlp_act.0"
    assert "64 wide" in str(can_read(subject_from(pair, dictionary)))
    for site in ("z.0", "mlp_in.0", "attn_in.1"):
        beside = can_read(subject_from(pair, dictionary_of(), site))
        assert beside is not None and "no part of the residual stream" in beside
    for site in ("resid_pre.1", "attn_out.0", "mlp_out.1"):
        assert can_read(subject_from(pair, dictionary_of(), site)) is None
    assert can_read(subject_from(pair, dictionary_of())) is None


def test_names_of_tokens_in_the_written_table(tiny_llama, tiny_tokenizer, tmp_path):
    """Of one model; the texts are those of the ids, also where the head has more rows than the tokenizer names."""
    base = tiny_llama(vocab_size=len(tiny_tokenizer) + 16)
    made = dictionary_of()
    made.save_pretrained(tmp_path / "sae")
    (tmp_path / "text.txt").write_text("The river runs past the old mill. " * 9)
    config = ExamplesConfig(
        str(base),
        dictionary=str(tmp_path / "sae"),
        corpus=(str(tmp_path / "text.txt"),),
        run=RunOptions(out=tmp_path / "run"),
        models=CPU,
    )
    index = LatentIndex.open(run_examples(config).path)
    subject = open_subject(base, None, tmp_path / "sae", None, CPU)
    logits = direct(subject.model("base"), made.W_dec.detach()[:, 0], len(tiny_tokenizer))
    texts = token_texts(tiny_tokenizer)
    for latent in index.latents:
        row = index.row(int(latent))
        assert row["promoted_base"] == [texts[i] for i in logits[latent].topk(10).indices.tolist()]
        assert row["promoted_tuned"] is None and row["changed"] is None
        near(row["suppressed_base_logits"], -(-logits[latent]).topk(10).values)


class TestReadText:
    @pytest.mark.parametrize("view", ["base", "pair", "diff"])
    def test_codes_and_losses(self, pair, view, tiny_tokenizer):
        text = "The miller counts 7 sacks — naïve \x1b[31m </script>"
        subject = subject_from(pair, dictionary_of(view))
        found = read_text(subject, text, top=3)
        ids = torch.tensor([[1, *tiny_tokenizer(text, add_special_tokens=False)["input_ids"]]])
        assert found.tokens == token_texts(tiny_tokenizer, ids[0].tolist())
        acts, loss = [], {}
        for side in ("base", "tuned"):
            model = pair.side(side)
            with torch.no_grad():
                out = model.model(ids, output_hidden_states=True)
            acts.append(out.hidden_states[1][0])
            loss[side] = torch.nn.functional.cross_entropy(out.logits[0, :-1], ids[0, 1:], reduction="none")
        near(found.loss_base[1:], loss["base"])
        near(found.loss_tuned[1:], loss["tuned"])
        assert found.loss_base[0] is None and found.value[0] == []
        signals = subject.signals(torch.stack(acts, 1)[1:])
        for name in ("value", "base", "tuned"):
            codes, own = getattr(signals, name), getattr(found, name)
            if codes is None:
                assert own is None and view == "diff"
                continue
            for row, token in zip(codes.dense(), own[1:], strict=True):
                best = row.topk(3)
                assert [one for one, _ in token] == best.indices[best.values > 0].tolist()
                near([value for _, value in token], best.values[best.values > 0])

    def test_named_latents_wherever_they_fire(self, pair):
        subject = subject_from(pair, dictionary_of())
        whole = read_text(subject, "seven apples and five pears", top=24, losses=False)
        some = read_text(subject, "seven apples and five pears", latents=[2, 5], losses=False)
        assert some.value == [[one for one in row if one[0] in (2, 5)] for row in whole.value]
        assert any(some.value) and set(some.loss_base) == {None}

    def test_one_model_has_no_tuned_side(self, tiny_llama, tmp_path):
        dictionary_of().save_pretrained(tmp_path / "sae")
        found = read_text(open_subject(tiny_llama(), None, tmp_path / "sae", None, CPU), "a mill")
        assert found.tuned is None and found.loss_tuned is None and found.base == found.value
        assert found.to_dict()["tokens"] == found.tokens

    def test_a_conversation(self, pair):
        messages = [{"role": "user", "content": "How many?"}, {"role": "assistant", "content": "Seven."}]
        found = read_text(subject_from(pair, dictionary_of()), messages)
        assert "".join(found.tokens).startswith("<s><|user|>\nHow many?")

    def test_long_and_empty_text(self, pair):
        subject = subject_from(pair, dictionary_of())
        found = read_text(subject, "mill " * 50_000, losses=False)
        assert found.cut and len(found.tokens) == min(LONGEST, 512)
        assert not read_text(subject, "\ud800 half a pair").cut
        halves = [{"role": "user", "content": "\ud800 half a pair"}, {"role": "assistant", "content": "a"}]
        assert read_text(subject, halves).tokens
        with pytest.raises(ConfigError, match="no text"):
            read_text(subject, "")
        with pytest.raises(ConfigError, match="no such latent"):
            read_text(subject, "a", latents=[24])

    @pytest.mark.parametrize(
        "messages",
        [
            [],
            [{"role": "user"}],
            [{"role": "user", "content": None}],
            [{"role": "user", "content": [{"type": "image"}]}],
            [{"role": "alien", "content": "a"}],
        ],
    )
    def test_messages_that_are_none(self, pair, messages):
        with pytest.raises(ConfigError, match="The conversation"):
            read_text(subject_from(pair, dictionary_of()), messages)


def test_a_lone_model_has_no_tuned_side(tiny_llama, tmp_path):
    dictionary_of().save_pretrained(tmp_path / "sae")
    subject = open_subject(tiny_llama(), None, tmp_path / "sae", None, CPU)
    with pytest.raises(ConfigError, match="no tuned model"):
        subject.model("tuned")
    assert SimpleNamespace(sides=subject.sides).sides == ("base",)
