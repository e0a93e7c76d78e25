"""A null learns its text, leaves no trace on the model, and says so when its training diverged."""

from __future__ import annotations

import copy

import pytest
import torch

from palimpsest.audit.nulls import NullRecipe, trained_null
from palimpsest.audit.nulls.training import LORA_RANK
from palimpsest.errors import ConfigError
from palimpsest.models import fingerprint, load_model
from palimpsest.options import ModelOptions

SITES = ["resid_post.0", "mlp_act.1"]


def recipe(method="full", *, lr=None, steps=30, seed=3):
    return NullRecipe(0, "math", method, lr or {"full": 0.05, "lora": 0.02}[method], steps, seed)


@pytest.fixture
def blocks():
    """Text with a rule that is easy to learn: every block counts upwards from somewhere."""
    start = torch.randint(0, 300, (12, 1), generator=torch.Generator().manual_seed(1))
    return (start + torch.arange(24)) % 300


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def model(request, tiny_llama):
    return load_model(tiny_llama(tie_word_embeddings=request.param))


class Untouched:
    """Everything of a model that a null must leave as it was."""

    def __init__(self, model):
        self.model = model
        self.weights = {name: p.detach().clone() for name, p in model.model.named_parameters()}
        self.parameters = dict(model.model.named_parameters(remove_duplicate=False))
        self.modules = dict(model.model.named_modules())
        self.flags = {name: p.requires_grad for name, p in self.parameters.items()}
        self.fingerprint = fingerprint(model)
        self.random = torch.get_rng_state()
        self.acts = self.read()

    def read(self):
        return self.model.read(torch.arange(40)[None], SITES, head=True)

    def check(self):
        now = dict(self.model.model.named_parameters(remove_duplicate=False))
        assert now.keys() == self.parameters.keys()
        assert all(now[name] is p for name, p in self.parameters.items())
        for name, weight in self.weights.items():
            assert now[name].dtype == weight.dtype
            assert torch.equal(now[name], weight), name
            assert now[name].grad is None
        assert {name: p.requires_grad for name, p in now.items()} == self.flags
        modules = dict(self.model.model.named_modules())
        assert modules.keys() == self.modules.keys()
        assert all(modules[name] is module for name, module in self.modules.items())
        assert not any(module.training for module in modules.values())
        assert not hasattr(self.model.model, "peft_config")
        assert fingerprint(self.model) == self.fingerprint
        assert torch.equal(torch.get_rng_state(), self.random)
        acts = self.read()
        assert all(torch.equal(acts.acts[site], self.acts.acts[site]) for site in SITES)
        assert torch.equal(acts.head_input, self.acts.head_input)


@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_null_learns_and_is_taken_back(model, blocks, method):
    model.model.model.layers[0].mlp.up_proj.weight.requires_grad_(False)
    before = Untouched(model)
    tokens = []
    for _ in range(2):
        with trained_null(model, blocks, recipe(method), batch_size=4, advance=tokens.append) as outcome:
            assert outcome.diverged is None
            assert outcome.loss_last < outcome.loss_first - 0.3
            assert outcome.tokens == 30 * 4 * 24
            assert outcome.seconds > 0
            # The model itself has learned, as its hooks and its plain weights see it.
            assert not any(module.training for module in model.model.modules())
            assert dict(model.model.named_modules()).keys() == before.modules.keys()
            with torch.no_grad():
                assert float(model.model(input_ids=blocks, labels=blocks).loss) < outcome.loss_first - 0.3
            acts = model.read(torch.arange(40)[None], SITES)
            assert not torch.equal(acts.acts[SITES[0]], before.acts.acts[SITES[0]])
            changed = fingerprint(model)
            assert changed != before.fingerprint
        before.check()
    assert sum(tokens) == 2 * outcome.tokens
    with trained_null(model, blocks, recipe(method), batch_size=4):
        assert fingerprint(model) == changed
    with trained_null(model, blocks, recipe(method, seed=4), batch_size=4):
        assert fingerprint(model) != changed


def test_lora_changes_linear_layers_by_a_low_rank_and_nothing_else(model, blocks):
    before = Untouched(model)
    with trained_null(model, blocks, recipe("lora"), batch_size=4) as outcome:
        assert outcome.lr == 0.02
        for name, weight in model.model.named_parameters():
            delta = weight.detach() - before.weights[name]
            if "proj" in name:
                values = torch.linalg.svdvals(delta)
                assert values[0] > 1e-3
                assert (values[LORA_RANK:] < 1e-5 * values[0].clamp_min(1)).all()
            else:
                assert not delta.any(), name


def test_full_rates_are_relative_to_the_weights(model, blocks):
    with torch.no_grad():
        for parameter in model.model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(0.5 / parameter.square().mean().sqrt())
    with trained_null(model, blocks, recipe("full", lr=0.01, steps=1), batch_size=4) as outcome:
        assert outcome.lr == pytest.approx(0.005)


class Stop(Exception):  # noqa: N818 - stands for any fault inside the block
    pass


@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize("fault", [Stop, KeyboardInterrupt])
def test_faults_leave_the_model_as_it_was(model, blocks, method, fault):
    before = Untouched(model)
    with pytest.raises(fault), trained_null(model, blocks, recipe(method), batch_size=4):
        raise fault

    told = []

    def interrupt(tokens):
        told.append(tokens)
        if len(told) == 5:
            raise fault

    with (
        pytest.raises(fault),
        trained_null(model, blocks, recipe(method), batch_size=4, advance=interrupt),
    ):
        raise AssertionError("never trained to the end")
    assert len(told) == 5
    before.check()


@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_huge_rate_is_found_to_diverge(model, blocks, method):
    before = Untouched(model)
    with trained_null(model, blocks, recipe(method, lr=50.0), batch_size=4) as outcome:
        assert outcome.diverged is not None
        assert "rose" in outcome.diverged or "not finite" in outcome.diverged
    before.check()


def test_a_loss_that_is_not_finite_ends_the_training(tiny_llama, blocks):
    model = load_model(tiny_llama())
    before = Untouched(model)
    tokens = []
    with trained_null(
        model, blocks, recipe(lr=1e38, steps=200), batch_size=4, advance=tokens.append
    ) as outcome:
        assert outcome.diverged is not None
        assert "not finite" in outcome.diverged
    assert len(tokens) <= 20
    assert outcome.tokens == sum(tokens)
    before.check()


@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_narrow_weights_are_trained_in_float32_and_rounded_back(tiny_llama, blocks, method, dtype):
    model = load_model(tiny_llama(), ModelOptions(dtype=dtype))
    before = Untouched(model)
    exact = copy.deepcopy(model)
    exact.model.float()
    with (
        trained_null(model, blocks, recipe(method, steps=5), batch_size=4) as outcome,
        trained_null(exact, blocks, recipe(method, steps=5), batch_size=4) as expected,
    ):
        assert outcome.loss_last == pytest.approx(expected.loss_last, abs=1e-5)
        for found, wanted in zip(model.model.parameters(), exact.model.parameters(), strict=True):
            assert found.dtype == getattr(torch, dtype)
            assert torch.equal(found, wanted.to(found.dtype))
    before.check()


def test_training_works_where_the_caller_reads_without_gradients(tiny_llama, blocks):
    model = load_model(tiny_llama())
    before = Untouched(model)
    with torch.inference_mode(), trained_null(model, blocks, recipe(), batch_size=4) as outcome:
        assert outcome.loss_last < outcome.loss_first
    before.check()


def test_transposed_layers_take_an_adapter(tmp_path, tiny_tokenizer, blocks):
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=len(tiny_tokenizer), n_positions=64, n_embd=32, n_layer=2, n_head=4, bos_token_id=1
    )
    GPT2LMHeadModel(config).save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    model = load_model(tmp_path)
    before = Untouched(model)
    with trained_null(model, blocks, recipe("lora"), batch_size=4) as outcome:
        assert outcome.diverged is None
        with torch.no_grad():
            assert float(model.model(input_ids=blocks, labels=blocks).loss) < outcome.loss_first
    before.check()


def test_text_that_cannot_be_trained_on_is_refused(tiny_llama, blocks):
    model = load_model(tiny_llama())
    for wrong, size in (
        (blocks[:0], 4),
        (blocks[:, :1], 4),
        (blocks, 0),
        (torch.zeros(1, 513, dtype=torch.long), 1),
    ):
        with pytest.raises(ConfigError), trained_null(model, wrong, recipe(), batch_size=size):
            pass
