"""The trainer finds planted directions, finds none in noise, and survives interruptions."""

import itertools

import pytest
import torch

from palimpsest.dictionaries import (
    Dictionary,
    Objective,
    checkpoint_position,
    load_dictionary,
    train_dictionary,
)
from palimpsest.dictionaries.training import checkpoint
from palimpsest.dictionaries.training.trainer import Trainer
from palimpsest.errors import ArtifactError, ConfigError, DictionaryError, NumericsError
from planted_stream import recipe, recovered, stream


@pytest.mark.parametrize("activation", ["topk", "batch_topk"])
def test_planted_directions_are_recovered_and_noise_is_not(activation):
    reports = []
    made = train_dictionary(stream(250_000), recipe(activation=activation), on_step=reports.append)
    noise = train_dictionary(stream(250_000, planted=False), recipe(activation=activation))
    assert recovered(made) > 0.9
    assert recovered(noise) < 0.6
    metrics = made.metadata["metrics"]
    assert metrics["fve"] > 0.8 and 0 <= metrics["dead_share"] < 0.3
    assert made.metadata["tokens"] == reports[-1]["tokens"] == 488 * 512
    assert reports[0]["reconstruction"] > reports[-1]["reconstruction"]
    weighted = reports[-1]["reconstruction"] + reports[-1].get("auxk", 0) / 32
    assert reports[-1]["loss"] == pytest.approx(weighted, rel=1e-5)


@pytest.mark.parametrize("tokens", [2_500, 10_000, 40_000])
def test_batch_topk_threshold_is_right_after_a_short_run(tokens):
    made = train_dictionary(stream(tokens), recipe(activation="batch_topk", tokens=tokens, lr=None))
    fresh = torch.cat(list(stream(10_000, seed=9)))
    assert made.encode(fresh).l0().float().mean().item() == pytest.approx(4, rel=0.15)


def test_scale_is_folded_into_unit_decoder_rows():
    config = recipe(tokens=20_000)
    made = train_dictionary(stream(20_000), config)
    torch.testing.assert_close(made.W_dec.norm(dim=(1, 2)), torch.ones(64))
    larger = train_dictionary((x * 64 for x in stream(20_000)), config)
    torch.testing.assert_close(larger.b_dec, made.b_dec * 64, atol=0.05, rtol=1e-3)
    x = torch.cat(list(stream(1_000, seed=5)))
    torch.testing.assert_close(larger(64 * x)[0] / 64, made(x)[0], atol=0.05, rtol=1e-2)


def test_two_models_give_a_pair_dictionary():
    louder = torch.tensor([1.0, 50.0])[:, None]
    made = train_dictionary((x * louder for x in stream(50_000, models=2)), recipe(tokens=50_000, k=6))
    x = torch.cat(list(stream(2_000, models=2, seed=8))) * louder
    output = made(x)[0]
    assert made.view == "pair" and made.models == 2 and output.shape == x.shape
    explained = 1 - (x - output).square().sum((0, 2)) / (x - x.mean(0)).square().sum((0, 2))
    assert (explained > 0.6).all() and made.metadata["metrics"]["fve"] > 0.6


def test_relu_and_bfloat16_train():
    sparse = Objective(sparsity_weight=0.3)
    for changes in ({"activation": "relu", "k": None, "objective": sparse}, {"dtype": "bfloat16"}):
        made = train_dictionary(stream(50_000), recipe(tokens=50_000, **changes))
        assert made.metadata["metrics"]["fve"] > 0.6 and made.dtype == torch.float32


@pytest.mark.parametrize("activation", ["topk", "batch_topk"])
def test_a_resumed_run_gives_the_same_weights(activation, tmp_path):
    config = recipe(
        tokens=512 * 60, activation=activation, checkpoint_every=19, dead_after_tokens=1100, k_anneal=0.5
    )
    whole = train_dictionary(stream(40_000), config, out=tmp_path / "whole")

    def interrupted():
        yield from itertools.islice(stream(40_000), 50)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_dictionary(interrupted(), config, out=tmp_path / "cut")
    position = checkpoint_position(tmp_path / "cut")
    assert position == 512 * 38
    with pytest.raises(DictionaryError, match="not finished"):
        load_dictionary(tmp_path / "cut")
    rest = torch.cat(list(stream(40_000)))[position:].split(700)
    with pytest.raises(ArtifactError, match="seed"):
        train_dictionary(rest, recipe(seed=2, tokens=512 * 60), out=tmp_path / "cut", resume=True)
    train_dictionary(rest, config, out=tmp_path / "cut", resume=True)

    resumed, saved = load_dictionary(tmp_path / "cut"), load_dictionary(tmp_path / "whole")
    for name, tensor in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], tensor) and torch.equal(
            saved.state_dict()[name], tensor
        )
    assert checkpoint_position(tmp_path / "cut") == 0
    assert isinstance(train_dictionary([], config, out=tmp_path / "cut", resume=True), Dictionary)


def test_a_checkpoint_holds_the_whole_state(tmp_path):
    x = torch.cat(list(stream(1_000)))
    trainer = Trainer.start(recipe(activation="batch_topk", dead_after_tokens=100), x)
    for piece in x.split(20):
        trainer.advance(piece)
    assert trainer.idle.max() > 20 and trainer.dead.numel() and trainer.threshold > 0
    checkpoint.save({"": trainer}, tmp_path / "state.safetensors")
    restored, stream_state = checkpoint.load({"": trainer.config}, tmp_path / "state.safetensors")
    loaded = restored[""]
    assert stream_state == {}
    for name in ("idle", "dead", "threshold", "scale"):
        assert torch.equal(getattr(loaded, name), getattr(trainer, name))
    assert (loaded.step, loaded.tokens) == (50, 1_000)
    assert trainer.advance(x).losses.total() == loaded.advance(x).losses.total()


def test_steps_do_not_stretch_decoder_rows():
    x = torch.cat(list(stream(1_000)))
    trainer = Trainer.start(recipe(), x)
    for _ in range(3):
        rows = trainer.weights.dec.detach().clone()
        trainer.advance(x)
        grad = trainer.weights.dec.grad
        assert (grad.abs().amax() > 1e-4) and ((grad * rows).sum(1).abs() < 1e-6).all()
        torch.testing.assert_close(trainer.weights.dec.norm(dim=1), torch.ones(64))


def test_bad_streams_are_refused():
    def spoiled(at):
        for step, x in enumerate(stream(20_000, piece=512)):
            yield torch.full_like(x, float("nan")) if step == at else x

    for at in (0, 7):
        with pytest.raises(NumericsError, match=f"step {at} "):
            train_dictionary(spoiled(at), recipe(tokens=15_000))
    with pytest.raises(ConfigError, match="nothing"):
        train_dictionary([], recipe())
    with pytest.raises(DictionaryError, match="one width"):
        train_dictionary([torch.randn(600, 1, 8), torch.randn(600, 1, 9)], recipe())
    with pytest.raises(ConfigError, match="does not fit the number"):
        recipe(k=65)


def test_training_leaves_the_callers_generator_alone():
    torch.manual_seed(4)
    expected = torch.rand(3)
    torch.manual_seed(4)
    train_dictionary(stream(2_000), recipe(tokens=1_000))
    assert torch.equal(torch.rand(3), expected)
