"""Held-out figures of a tuned model against dense computations written from the definitions."""

from __future__ import annotations

import math
from contextlib import nullcontext
from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from pair_fixture import load_hf, lora
from palimpsest.errors import ConfigError
from palimpsest.models import load_model
from palimpsest.options import ModelOptions
from palimpsest.tune.config import ObjectiveOptions
from palimpsest.tune.contrast import sides
from palimpsest.tune.data import TuneData
from palimpsest.tune.measure import Part, Yardstick, estimate, interval
from palimpsest.tune.rows import IGNORED, KtoRow, PairRow, PromptRow, TextRow, evenly
from palimpsest.tune.summary import summarise

RNG = np.random.default_rng(3)


def tokens(low, high):
    return RNG.integers(3, 300, RNG.integers(low, high)).tolist()


TEXTS = [TextRow(ids, [IGNORED] * 2 + ids[2:]) for ids in (tokens(4, 19) for _ in range(9))]
GENERAL = [TextRow(ids, ids) for ids in (tokens(3, 25) for _ in range(7))]
PAIRS = [PairRow(tokens(2, 8), tokens(1, 9), tokens(1, 9)) for _ in range(8)]


@pytest.fixture(scope="module")
def language(tiny_llama):
    return load_model(tiny_llama(), ModelOptions(device="cpu"))


@pytest.fixture(scope="module")
def tuned(language):
    from peft import get_peft_model

    torch.manual_seed(2)
    model = get_peft_model(language.model, lora())
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = 0.3 * torch.randn_like(parameter)
    return model


def logprobs(model, ids, *, base):
    """[predictions, vocab] in float64 of one row alone; the whole logits at once."""
    with torch.no_grad(), model.disable_adapter() if base else nullcontext():
        return model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)


def logp(model, ids, labels, *, base=False):
    """Log-probability of the labelled tokens of one row, and their number."""
    rows = logprobs(model, ids, base=base)
    terms = [rows[t - 1, labels[t]].item() for t in range(1, len(ids)) if labels[t] != IGNORED]
    return sum(terms), len(terms)


def answer_logp(model, prompt, answer, *, base=False):
    return logp(model, prompt + answer, [IGNORED] * len(prompt) + answer, base=base)


def yardstick(language, objective, rows, *, tokens_per_batch=40, reward=None, **keywords):
    more = {"retain": ("x",)} if objective == "unlearn" else {}
    more |= {"reward": "m:f", "completion_length": 5} if objective == "grpo" else {}
    options = ObjectiveOptions(objective=objective, data=("x",), **more)
    return Yardstick(language, options, rows, tokens_per_batch=tokens_per_batch, reward=reward, **keywords)


def both(stick, model):
    before = stick.before(model)
    return before, stick.measure(model)


def test_text_and_general_text_equal_a_dense_computation(language, tuned):
    before, after = both(yardstick(language, "sft", TEXTS, general=GENERAL), tuned)
    found = summarise(before, after)
    for base, key in ((True, "before"), (False, "after")):
        sums = np.array([logp(tuned, row.input_ids, row.labels, base=base) for row in TEXTS])
        assert found["objective_value"][key] == pytest.approx(-sums[:, 0].sum() / sums[:, 1].sum(), rel=1e-5)
        assert found["heldout_loss"]["tokens"] == sums[:, 1].sum()
    divergence, nats, count = 0.0, 0.0, 0
    for row in GENERAL:
        p, q = (logprobs(tuned, row.input_ids, base=base)[:-1] for base in (True, False))
        divergence += (p.exp() * (p - q)).sum().item()
        nats -= sum(q[t, token].item() for t, token in enumerate(row.input_ids[1:]))
        count += len(row.input_ids) - 1
    assert found["general"]["kl"] == pytest.approx(divergence / count, rel=1e-4)
    assert found["general"]["loss_after"] == pytest.approx(nats / count, rel=1e-5)
    assert found["general"]["tokens"] == count
    assert found["general"]["kl"] > 0.01
    assert found["margin"] is None


def test_the_base_against_itself_is_nothing(language, tuned):
    stick = yardstick(language, "dpo", PAIRS, general=GENERAL)
    with tuned.disable_adapter():
        found = summarise(*both(stick, tuned))
    assert found["objective_value"]["before"] == found["objective_value"]["after"] == math.log(2)
    assert found["objective_value"]["ci"] == [0.0, 0.0]
    assert found["margin"] == {"after": 0.0, "ci": [0.0, 0.0], "accuracy": 0.0}
    assert found["general"]["kl"] == 0.0
    assert found["general"]["loss_before"] == found["general"]["loss_after"]


def pair_terms(model):
    for row in PAIRS:
        yield [
            answer_logp(model, row.prompt, one, base=base)
            for one in (row.chosen, row.rejected)
            for base in (False, True)
        ]


def test_pairs_equal_a_dense_computation(language, tuned):
    found = summarise(*both(yardstick(language, "dpo", PAIRS), tuned))
    margins = [(c - c0) - (r - r0) for (c, _), (c0, _), (r, _), (r0, _) in pair_terms(tuned)]
    losses = [-F.logsigmoid(torch.tensor(0.1 * m)).item() for m in margins]
    assert found["objective_value"]["before"] == math.log(2)
    assert found["objective_value"]["after"] == pytest.approx(np.mean(losses), rel=1e-5)
    assert found["margin"]["after"] == pytest.approx(np.mean(margins), rel=1e-4)
    assert found["margin"]["accuracy"] == np.mean(np.array(margins) > 0)
    lo, hi = found["margin"]["ci"]
    assert lo < found["margin"]["after"] < hi
    chosen = np.array([terms[0] for terms in pair_terms(tuned)])
    assert found["heldout_loss"]["after"] == pytest.approx(-chosen[:, 0].sum() / chosen[:, 1].sum(), rel=1e-5)


def test_orpo_and_simpo_are_the_losses_of_trl(language, tuned):
    """The formulas as trl writes them, fed with log-probabilities of one row alone."""
    terms = list(pair_terms(tuned))
    chosen = torch.tensor([c / n for (c, n), *_ in terms], dtype=torch.float64)
    rejected = torch.tensor([r / n for _, _, (r, n), _ in terms], dtype=torch.float64)
    odds = (chosen - rejected) - (torch.log1p(-chosen.exp()) - torch.log1p(-rejected.exp()))
    whole = [logp(tuned, row.prompt + row.chosen, row.prompt + row.chosen) for row in PAIRS]
    nll = -sum(s for s, _ in whole) / sum(n for _, n in whole)
    orpo = yardstick(language, "orpo", PAIRS).measure(tuned)
    assert orpo.value == pytest.approx(nll - 0.1 * F.logsigmoid(odds).mean().item(), rel=1e-5)
    simpo = yardstick(language, "simpo", PAIRS).measure(tuned)
    wanted = -F.logsigmoid(10 * (chosen - rejected - 0.5 / 10)).mean().item()
    assert simpo.value == pytest.approx(wanted, rel=1e-5)


def test_kto_equals_a_dense_computation(language, tuned):
    rows = [KtoRow(pair.prompt, pair.chosen, bool(place % 3)) for place, pair in enumerate(PAIRS)]
    before, after = both(yardstick(language, "kto", rows), tuned)
    assert before.value == 0.5

    def ratio(prompt, answer):
        here, there = (answer_logp(tuned, prompt, answer, base=base)[0] for base in (False, True))
        return here - there

    ratios = [ratio(row.prompt, row.answer) for row in rows]
    z = max(0.0, np.mean([ratio(a.prompt, b.answer) for a, b in zip(rows, rows[-1:] + rows, strict=False)]))
    signed = [r - z if row.label else z - r for r, row in zip(ratios, rows, strict=True)]
    assert after.value == pytest.approx(np.mean([1 - 1 / (1 + math.exp(-0.1 * s)) for s in signed]), rel=1e-5)


def test_unlearning_says_what_is_forgotten_and_what_stays(language, tuned):
    stick = yardstick(language, "unlearn", TEXTS, retain=GENERAL)
    before, after = both(stick, tuned)
    ratios = []
    for row in TEXTS:
        here, there = (logp(tuned, row.input_ids, row.labels, base=base)[0] for base in (False, True))
        ratios.append(here - there)
    kept = np.array([logp(tuned, row.input_ids, row.labels) for row in GENERAL])
    npo = np.mean([20 * math.log1p(math.exp(0.1 * r)) for r in ratios])
    retained = -kept[:, 0].sum() / kept[:, 1].sum()
    assert after.value == pytest.approx(npo + retained, rel=1e-5)
    found = summarise(before, after)
    assert found["retain"]["after"] == found["heldout_loss"]["after"] == pytest.approx(retained, rel=1e-5)
    assert (found["forget"]["better"], found["retain"]["better"]) == ("higher", "lower")
    assert found["forget"]["difference"] == pytest.approx(-sum(ratios) / found["forget"]["tokens"], rel=1e-4)


def test_rewards_are_those_of_greedy_answers(language, tuned):
    prompts = [
        PromptRow(ids, f"prompt {i}", {"n": i}) for i, ids in enumerate([[1, 9, 8], [1, 7], [1, 9, 4]])
    ]
    seen = {}

    def reward(prompts, completions, n, **_):
        seen[len(seen)] = (prompts, completions, n)
        return [float(len(text)) if i else None for i, text in enumerate(completions)]

    before, after = both(yardstick(language, "grpo", prompts, reward=reward), tuned)
    for order, base in enumerate((True, False)):
        said = []
        for row in prompts:
            ids = list(row.prompt)
            for _ in range(5):
                ids.append(int(logprobs(tuned, ids, base=base)[-1].argmax()))
                if ids[-1] == language.tokenizer.eos_token_id:
                    break
            said.append(language.tokenizer.decode(ids[len(row.prompt) :], skip_special_tokens=True))
        assert seen[order] == ([row.text for row in prompts], said, [0, 1, 2])
        value = (before, after)[order].value
        assert value == -np.mean([len(text) for text in said[1:]])
    assert summarise(before, after)["heldout_loss"] is None
    with pytest.raises(ConfigError, match="one number per completion"):
        yardstick(language, "grpo", prompts, reward=lambda **_: [1.0]).measure(tuned)


@pytest.mark.parametrize("size", [1, 30, 100_000])
def test_batches_and_padding_change_nothing(language, tuned, size):
    wanted = yardstick(language, "sft", TEXTS, general=GENERAL, tokens_per_batch=7).measure(tuned)
    found = yardstick(language, "sft", TEXTS, general=GENERAL, tokens_per_batch=size).measure(tuned)
    assert found.value == pytest.approx(wanted.value, rel=1e-6)
    np.testing.assert_allclose(found.general.kl, wanted.general.kl, rtol=1e-4)


def test_the_model_comes_back_as_it_was(language, tuned):
    tuned.train()
    tuned.base_model.model.model.layers[1].eval()
    before = [module.training for module in tuned.modules()]
    frozen = [parameter.requires_grad for parameter in tuned.parameters()]
    yardstick(language, "sft", TEXTS, general=GENERAL).measure(tuned)
    assert [module.training for module in tuned.modules()] == before
    assert [parameter.requires_grad for parameter in tuned.parameters()] == frozen
    assert not any(module._forward_pre_hooks for module in tuned.modules())
    tuned.eval()


def test_the_base_is_scored_once(language, tuned):
    stick = yardstick(language, "dpo", PAIRS, general=GENERAL)
    stick.before(tuned)
    calls = []
    handle = tuned.get_base_model().model.layers[0].register_forward_hook(lambda *_: calls.append(1))
    off = []
    plain = tuned.disable_adapter

    def counted():
        off.append(1)
        return plain()

    tuned.disable_adapter = counted
    try:
        stick.measure(tuned)
        stick.measure(tuned, general=False)
    finally:
        handle.remove()
        del tuned.disable_adapter
    assert calls
    assert not off


def test_logits_of_a_batch_are_never_held(language, tuned, monkeypatch):
    """The head is only ever called on as many tokens as fit the budget for logits."""
    from palimpsest.evaluate import splice

    sizes = []
    head = tuned.get_output_embeddings()
    monkeypatch.setattr(splice, "LOGIT_BYTES", 1)
    handle = head.register_forward_hook(lambda _m, args, _o: sizes.append(args[0].shape[:-1].numel()))
    rows = [TextRow(ids, ids) for ids in (tokens(80, 90) for _ in range(4))]
    try:
        yardstick(language, "sft", rows, general=rows, tokens_per_batch=1000).measure(tuned)
    finally:
        handle.remove()
    assert sizes
    assert max(sizes) <= 64


def test_logits_with_a_cap_are_the_models_own(tmp_path, tiny_tokenizer):
    from transformers import Gemma2Config, Gemma2ForCausalLM

    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = Gemma2Config(
        **shape,
        num_key_value_heads=2,
        head_dim=8,
        vocab_size=len(tiny_tokenizer),
        final_logit_softcapping=0.5,
    )
    model = Gemma2ForCausalLM(config)
    model.get_output_embeddings().weight.data.mul_(40)
    model.save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    language = load_model(str(tmp_path), ModelOptions(device="cpu"))
    found = yardstick(language, "sft", GENERAL).measure(language.model)
    reference = load_hf(tmp_path)
    nats, count = 0.0, 0
    for row in GENERAL:
        with torch.no_grad():
            logits = reference(input_ids=torch.tensor([row.input_ids])).logits[0, :-1].double()
        nats += F.cross_entropy(logits, torch.tensor(row.input_ids[1:]), reduction="sum").item()
        count += len(row.input_ids) - 1
    assert found.value == pytest.approx(nats / count, rel=1e-5)


def test_intervals_cover_and_shrink():
    rng = np.random.default_rng(0)
    inside = 0
    for trial in range(100):
        values = rng.normal(1.0, 2.0, 20)
        lo, hi = interval([Part(values, np.ones(20))], resamples=300, seed=trial)
        inside += lo < 1.0 < hi
    assert 88 <= inside <= 100
    many = rng.normal(1.0, 2.0, 2000)
    wide, narrow = (np.diff(interval([Part(v, np.ones(len(v)))])) for v in (many[:20], many))
    assert narrow < wide / 3


def test_parts_of_one_group_are_resampled_together():
    values = np.random.default_rng(1).normal(size=30)
    together = [Part(values, np.ones(30)), Part(values, np.ones(30), factor=-1.0)]
    assert interval(together) == [0.0, 0.0]
    apart = [together[0], together[1]._replace(group="other")]
    lo, hi = interval(apart)
    assert lo < -0.1 < 0.1 < hi
    assert estimate(apart) == 0.0


def test_a_single_row_has_no_interval(language, tuned):
    found = summarise(*both(yardstick(language, "sft", TEXTS[:1]), tuned))
    assert all(math.isnan(end) for end in found["objective_value"]["ci"])


def test_a_few_rows_have_none_either():
    values = np.arange(6.0)
    ends = {n: interval([Part(values[:n], np.ones(n))]) for n in (2, 5, 6)}
    assert all(math.isnan(end) for n in (2, 5) for end in ends[n])
    assert ends[6][0] < 2.5 < ends[6][1]


def test_measured_rows_are_spread_over_all():
    assert evenly(range(100), 4) == [12, 37, 62, 87]
    assert evenly(range(3), 64) == [0, 1, 2]
    assert evenly([], 4) == []
    found = evenly(range(1000), 64)
    assert len(set(found)) == 64
    assert {b - a for a, b in pairwise(found)} == {15, 16}


def test_both_kinds_of_a_contrast_are_spread_over_all():
    rows = [PairRow([n], [n], [n, n]) for n in range(8)]
    found = sides(ObjectiveOptions(objective="dpo", data=("x",)), TuneData(rows, [], [], [], [], 9), 2)
    assert [row.input_ids for row in found.wanted] == [[2, 2], [6, 6]]
    assert [row.input_ids for row in found.other] == [[2, 2, 2], [6, 6, 6]]


@pytest.mark.parametrize(
    ("objective", "rows"), [("sft", []), ("dpo", TEXTS), ("sft", PAIRS), ("kto", PAIRS), ("grpo", TEXTS)]
)
def test_rows_of_another_kind_are_refused(language, objective, rows):
    with pytest.raises(ConfigError, match="no held-out rows"):
        yardstick(language, objective, rows, reward=lambda **_: [])
