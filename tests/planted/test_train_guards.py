"""What training optimises, how its schedules run, and what it refuses or survives: found by review, kept by tests."""

from dataclasses import replace

import pytest
import torch

from palimpsest.buffer import ShuffleBuffer
from palimpsest.dictionaries import Objective, Partition, TrainConfig, train_dictionaries, train_dictionary
from palimpsest.dictionaries.training.step import Plan, forward
from palimpsest.dictionaries.training.trainer import Trainer, geometric_median
from palimpsest.errors import ConfigError, NumericsError
from planted_stream import recipe, stream

KINDS = {
    "topk": {},
    "batch_topk": {"activation": "batch_topk"},
    "matryoshka": {"activation": "batch_topk", "prefixes": (16, 64)},
    "relu": {"activation": "relu", "k": None},
    "jumprelu": {"activation": "jumprelu", "k": None, "objective": Objective(preact_weight=0.1)},
}


def rows(models=1, count=600):
    return torch.cat(list(stream(count, piece=100, models=models)))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("models", [1, 2])
def test_a_step_follows_the_weighted_terms_and_nothing_else(kind, models, monkeypatch):
    """The gradient that the optimiser's side receives, against that of the logged terms."""
    from palimpsest.dictionaries.training.weights import Weights

    config = recipe(
        **KINDS[kind], dead_after_tokens=150, clip=1e9, dtype="float32", tokens=600, batch_size=100
    )
    x = rows(models)
    trainer = Trainer.start(config, x)
    for piece in x[:300].split(100):
        trainer.advance(piece)
    trainer.idle[:9] = 10**6
    trainer.step = 10  # where it looks for dead latents
    taken = {}

    def record(self, config):
        taken.update({name: tensor.grad.clone() for name, tensor in self.named().items()})

    held = {name: tensor.detach().clone() for name, tensor in trainer.weights.named().items()}
    monkeypatch.setattr(Weights, "constrain_gradients", record)
    made = trainer.advance(x[300:400])
    again = replace(trainer.weights, **{n: t.requires_grad_(True) for n, t in held.items()})
    plan = Plan(10, trainer.dead, None, trainer.density, "float32")
    terms = forward(again, x[300:400] * trainer.scale[:, None], config, plan).losses
    expected = {"auxk"} if kind in ("topk", "batch_topk", "matryoshka") else {"sparsity"}
    assert expected | {"reconstruction"} <= set(terms.terms) and set(terms.terms) == set(made.losses.terms)
    assert ("preact" in terms.terms) == (kind == "jumprelu")
    total = sum(terms.weights[name] * term for name, term in terms.terms.items())
    for (name, tensor), grad in zip(
        again.named().items(), torch.autograd.grad(total, list(again.named().values())), strict=True
    ):
        torch.testing.assert_close(taken[name], grad, atol=1e-6, rtol=1e-4)
        assert tensor.shape == grad.shape and grad.any()


def test_schedules():
    config = TrainConfig(tokens=100_000, batch_size=1000, lr=1.0, warmup=0.1, decay=0.2, k=8, k_anneal=0.5)
    assert [round(config.lr_at(step), 3) for step in (0, 4, 9, 50, 79, 80, 90, 99)] == [
        *(0.1, 0.5, 1.0, 1.0, 1.0, 1.0, 0.5, 0.05),
    ]
    assert [config.k_at(step) for step in (0, 25, 50, 99)] == [32, 20, 8, 8]
    assert replace(config, n_latents=16).k_at(0) == 16
    relu = TrainConfig(
        activation="relu",
        tokens=100_000,
        batch_size=1000,
        objective=Objective(sparsity_weight=2.0, sparsity_warmup=0.5),
    )
    assert [relu.sparsity_weight_at(step) for step in (0, 24, 49, 99)] == [0.04, 1.0, 2.0, 2.0]
    assert relu.checkpoint_steps == 10 and TrainConfig(checkpoint_every=7).checkpoint_steps == 7


def test_shared_latents_pay_less():
    x, terms = rows(2), []
    for penalty in (1.0, 0.25):
        config = recipe(
            activation="relu",
            k=None,
            partition=Partition(shared=64),
            objective=Objective(shared_penalty=penalty),
        )
        trainer = Trainer.start(config, x)
        terms.append(forward(trainer.weights, x, config, trainer._plan()).losses.terms["sparsity"].item())
    assert terms[1] == pytest.approx(terms[0] / 4)


def test_the_median_ignores_an_outlier():
    points = torch.randn(200, 5) * 0.1 + 3
    points[0] = 1e6
    assert (geometric_median(points) - 3).abs().max() < 0.1 < (points.mean(0) - 3).abs().max()


def test_auxk_revives_latents_that_never_fire():
    """Half of the encoder is too short to be chosen."""
    share = {}
    for weight in (0.0, 1 / 32):
        config = recipe(dead_after_tokens=2000, objective=Objective(auxk_alpha=weight), tokens=60_000)
        x = torch.cat(list(stream(60_000)))
        trainer = Trainer.start(config, x[:512])
        with torch.no_grad():
            trainer.weights.enc[32:] *= 0.05
        for piece in x.split(512):
            if trainer.step < config.steps:
                trainer.advance(piece)
        share[weight] = trainer.dead_share()
    assert share[0.0] > 0.3 and share[1 / 32] < 0.1


@pytest.mark.parametrize("kind", ["relu", "jumprelu"])
def test_dense_and_sparse_phases_resume_exactly(kind, tmp_path, monkeypatch):
    """The step that goes over to entries lies before the checkpoint."""
    data = torch.cat(list(stream(40_000)))
    weights = Objective(sparsity_weight=2.0)
    config = recipe(
        activation=kind, k=None, objective=weights, tokens=512 * 60, checkpoint_every=41, lr=4e-3, log_every=1
    )
    reports = []
    train_dictionary([data], config, on_step=reports.append)
    densities = [report["l0"] / 64 for report in reports]
    monkeypatch.setattr("palimpsest.dictionaries.training.step.SPARSE_BELOW", densities[19] + 1e-6)
    assert densities[0] > densities[19] > densities[40]
    whole = train_dictionary([data], config)

    def cut():
        yield data[: 45 * 512]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_dictionary(cut(), config, out=tmp_path / "run")
    made = train_dictionary([data[41 * 512 :]], config, out=tmp_path / "run", resume=True)
    for name, tensor in whole.state_dict().items():
        assert torch.equal(made.state_dict()[name], tensor), name


@pytest.mark.parametrize("share", [0.5, 0.9, 1.0])
def test_the_threshold_is_right_after_annealing(share):
    made = train_dictionary(
        stream(60_000), recipe(activation="batch_topk", tokens=60_000, k_anneal=share, lr=None)
    )
    fresh = torch.cat(list(stream(10_000, seed=9)))
    assert made.encode(fresh).l0().float().mean().item() == pytest.approx(4, rel=0.15)


def test_resume_takes_no_rest_that_the_whole_run_leaves(tmp_path):
    data = torch.cat(list(stream(20_000)))[: 20 * 512 + 100]
    config = recipe(tokens=40 * 512, checkpoint_every=20)
    whole = train_dictionary([data], config)

    def cut():
        yield data[: 20 * 512]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_dictionary(cut(), config, out=tmp_path / "run")
    made = train_dictionary([data[20 * 512 :]], config, out=tmp_path / "run", resume=True)
    assert made.metadata["tokens"] == whole.metadata["tokens"] == 20 * 512
    assert torch.equal(made.W_dec, whole.W_dec)


def test_a_buffer_of_other_batches_is_refused():
    data = torch.cat(list(stream(20_000)))
    buffer = ShuffleBuffer(lambda position: iter([data[position:]]), capacity=4096, batch_size=700, seed=0)
    with pytest.raises(ConfigError, match="not those of the recipe"):
        train_dictionary(buffer, recipe(tokens=10_000))


def test_batches_without_spread_do_not_blow_up():
    def constant():
        yield from stream(2_560, piece=512)
        yield torch.ones(512, 1, 24) * 7
        yield from stream(5_120, piece=512, seed=4)

    reports = []
    made = train_dictionary(constant(), recipe(tokens=16 * 512, log_every=1), on_step=reports.append)
    assert all(abs(report["loss"]) < 1e4 for report in reports) and len(reports) == 16
    assert torch.isfinite(made.W_dec).all()


def test_a_stream_under_no_grad_trains():
    def quiet(mode):
        with mode():
            yield from stream(5_000)

    made = [
        train_dictionary(quiet(mode), recipe(tokens=4_000)) for mode in (torch.no_grad, torch.inference_mode)
    ]
    plain = train_dictionary(stream(5_000), recipe(tokens=4_000))
    assert all(torch.equal(one.W_dec, plain.W_dec) for one in made)


def test_a_default_dtype_changes_nothing():
    x = torch.cat(list(stream(2_000)))
    plain = train_dictionary([x], recipe(tokens=1_500))
    torch.set_default_dtype(torch.bfloat16)
    try:
        made = train_dictionary([x], recipe(tokens=1_500))
        codes = made.encode(x)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(made.W_enc, plain.W_enc) and torch.equal(codes.indices, plain.encode(x).indices)


def test_weights_that_are_no_numbers_are_no_dictionary():
    trainer = Trainer.start(recipe(), rows())
    with torch.no_grad():
        trainer.weights.b_enc[3] = torch.nan
    with pytest.raises(NumericsError, match="b_enc became NaN"):
        trainer.finished({})


@pytest.mark.parametrize("name", ["parts", "manifest.json", "a b", "x" * 200, ".hidden"])
def test_names_that_a_folder_cannot_hold(name):
    with pytest.raises(ConfigError, match="folder name"):
        train_dictionaries(stream(1_000), {name: recipe()})


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"clip": float("nan")}, "clip must be above 0"),
        ({"lr": float("inf")}, "lr must be above 0"),
        ({"dead_after_tokens": 0}, "dead_after_tokens must be above 0"),
        ({"batch_size": 1}, "no spread"),
        ({"tokens": 100}, "larger than the whole run"),
    ],
)
def test_numbers_that_mean_nothing(changes, problem):
    with pytest.raises(ConfigError, match=problem):
        recipe(**changes)
