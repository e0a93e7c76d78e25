"""Recipes beyond plain top-k: Matryoshka, jumprelu, relu; several dictionaries on one stream."""

import pytest
import torch

from palimpsest.buffer import ShuffleBuffer
from palimpsest.dictionaries import (
    Objective,
    Partition,
    TrainConfig,
    load_dictionary,
    train_dictionaries,
    train_dictionary,
)
from palimpsest.dictionaries.training.loop import BAD_BATCH, CHECKPOINT
from palimpsest.errors import ArtifactError, ConfigError, NumericsError
from planted_stream import directions, recipe, recovered, stream

ROWS = 40_000


def fve(made, x):
    output = made(x)[0]
    return 1 - ((x - output).square().sum() / (x - x.mean(0)).square().sum()).item()


def same(a, b):
    return all(torch.equal(tensor, b.state_dict()[name]) for name, tensor in a.state_dict().items())


@pytest.mark.parametrize("activation", ["topk", "batch_topk"])
def test_matryoshka_prefixes_reconstruct_on_their_own(activation):
    fields = {"activation": activation, "tokens": 100_000}
    nested = train_dictionary(stream(100_000), recipe(prefixes=(16, 32, 64), **fields))
    plain = train_dictionary(stream(100_000), recipe(**fields))
    x = torch.cat(list(stream(5_000, seed=7)))
    assert nested.prefixes == (16, 32, 64)
    small, middle, whole = (fve(nested.prefix(size), x) for size in nested.prefixes)
    assert 0.2 < small < middle < whole and whole > 0.6
    # The first latents of a plain dictionary are any latents; those of a nested one carry the most.
    cut = {name: tensor for name, tensor in plain.state_dict().items()}
    cut["W_dec"] = cut["W_dec"].clone()
    cut["W_dec"][16:] = 0
    plain.load_state_dict(cut)
    assert small > fve(plain, x) + 0.1


def test_jumprelu_learns_thresholds_and_finds_planted_directions():
    objective = Objective(sparsity_weight=2.0)
    config = recipe(activation="jumprelu", k=None, objective=objective, lr=4e-3)
    reports = []
    made = train_dictionary(stream(250_000), config, on_step=reports.append)
    x = torch.cat(list(stream(5_000, seed=7)))
    assert made.activation == "jumprelu" and made.threshold.min() >= 0
    assert made.threshold.std() > 0.01 * made.threshold.mean() > 0
    l0 = made.encode(x).l0().float().mean().item()
    assert 1 < l0 < 4 < reports[0]["l0"] and fve(made, x) > 0.7
    assert recovered(made) > 0.85


def test_relu_on_entries_gives_the_same_as_dense_throughout(monkeypatch):
    config = recipe(activation="relu", k=None, tokens=60_000, objective=Objective(sparsity_weight=1.0))
    seen = []
    monkeypatch.setattr("palimpsest.dictionaries.training.step.SPARSE_BELOW", 0.3)
    made = train_dictionary(stream(60_000), config, on_step=seen.append)
    monkeypatch.setattr("palimpsest.dictionaries.training.step.SPARSE_BELOW", 0.0)
    dense = train_dictionary(stream(60_000), config)
    # It begins dense, because the density is not known yet, and goes over to entries.
    assert 0 < seen[-1]["l0"] / 64 < 0.3
    torch.testing.assert_close(made.W_dec, dense.W_dec, atol=2e-3, rtol=1e-2)


def test_several_dictionaries_on_one_stream_are_those_trained_alone(tmp_path):
    configs = {
        "small": recipe(tokens=20_480, n_latents=32),
        "large": recipe(tokens=20_480, activation="batch_topk", k=6, seed=4),
    }
    reports = []
    made = train_dictionaries(stream(ROWS), configs, out=tmp_path / "both", on_step=reports.append)
    assert list(made) == ["small", "large"] and [r["name"] for r in reports[-2:]] == ["small", "large"]
    for name, config in configs.items():
        assert same(made[name], train_dictionary(stream(ROWS), config))
        assert same(load_dictionary(tmp_path / "both" / name), made[name])
    again = train_dictionaries([], configs, out=tmp_path / "both", resume=True)
    assert same(again["large"], made["large"])


def test_dictionaries_that_cannot_share_a_stream():
    for configs, problem in (
        ({}, "nothing to train"),
        ({"a": recipe(), "b": recipe(batch_size=64)}, "batch_size"),
        ({"../a": recipe()}, "folder name"),
        ({"": recipe()}, "folder name"),
    ):
        with pytest.raises(ConfigError, match=problem):
            train_dictionaries(stream(1_000), configs)


def buffered(seed=5):
    rows = torch.cat(list(stream(ROWS)))

    def source(position):
        while True:
            yield rows[position % len(rows) :]
            position = 0

    return ShuffleBuffer(source, capacity=2048, batch_size=512, seed=seed)


class Cut:
    """A stream that breaks off after some batches and otherwise is the one inside."""

    def __init__(self, inner, batches):
        self.inner, self.left = inner, batches
        self.state_dict, self.load_state_dict = inner.state_dict, inner.load_state_dict

    def __iter__(self):
        for x in self.inner:
            if self.left == 0:
                raise KeyboardInterrupt
            self.left -= 1
            yield x


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("batches", [9, 31])
def test_a_run_on_a_shuffle_buffer_resumes_exactly(several, batches, tmp_path):
    config = recipe(activation="batch_topk", tokens=512 * 40, checkpoint_every=8, dead_after_tokens=1500)

    def train(stream, out=None, **more):
        if several:
            both = {"a": config, "b": recipe(**{**vars(config), "k": 8})}
            return train_dictionaries(stream, both, out=out, **more)["b"]
        return train_dictionary(stream, config, out=out, **more)

    whole = train(buffered())
    with pytest.raises(KeyboardInterrupt):
        train(Cut(buffered(), batches), tmp_path / "cut")
    assert same(train(buffered(), tmp_path / "cut", resume=True), whole)
    assert not same(train(buffered(seed=6)), whole)


def test_the_batch_that_met_nan_is_kept(tmp_path):
    from safetensors.torch import load_file

    def spoiled():
        for step, x in enumerate(stream(20_000, piece=512)):
            if step == 6:
                x[3, 0, 5] = torch.nan
            yield x

    with pytest.raises(NumericsError, match=r"step 6 .*1 of 512 tokens, the first is row 3.*kept in"):
        train_dictionary(spoiled(), recipe(tokens=15_000, checkpoint_every=4), out=tmp_path / "run")
    batch = load_file(tmp_path / "run" / "parts" / BAD_BATCH)["activations"]
    assert torch.isnan(batch).sum() == 1 and torch.isnan(batch[3, 0, 5])
    assert (tmp_path / "run" / "parts" / CHECKPOINT).exists()


def test_a_loss_that_diverges_stops_the_run():
    with pytest.raises(NumericsError, match="loss became NaN.*learning rate"):
        train_dictionary(
            (x * 1e18 if i > 3 else x for i, x in enumerate(stream(20_000))),
            recipe(tokens=15_000, lr=1e30, warmup=0.0),
        )


def test_a_full_disk_leaves_the_last_checkpoint(tmp_path, monkeypatch):
    import safetensors.torch

    from palimpsest.dictionaries.training import checkpoint

    config = recipe(tokens=512 * 30, checkpoint_every=8)
    saved = []

    def full(tensors, path, metadata=None):
        saved.append(path)
        safetensors.torch.save_file(tensors, path, metadata)
        if len(saved) == 2:
            raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(ArtifactError, match="full"):
        train_dictionary(stream(ROWS), config, out=tmp_path / "run")
    monkeypatch.undo()
    from palimpsest.dictionaries import checkpoint_position

    position = checkpoint_position(tmp_path / "run")
    assert position == 8 * 512
    rest = torch.cat(list(stream(ROWS)))[position:]
    made = train_dictionary([rest], config, out=tmp_path / "run", resume=True)
    assert same(made, train_dictionary(stream(ROWS), config))


def test_a_damaged_checkpoint_is_refused(tmp_path):
    config = recipe(tokens=512 * 30, checkpoint_every=8)
    with pytest.raises(KeyboardInterrupt):
        train_dictionary(Cut(buffered(), 12), config, out=tmp_path / "run")
    place = tmp_path / "run" / "parts" / CHECKPOINT
    content = place.read_bytes()
    place.write_bytes(content[: len(content) // 2])
    with pytest.raises(ArtifactError, match="no readable checkpoint.*--overwrite"):
        train_dictionary(buffered(), config, out=tmp_path / "run", resume=True)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"k": 65}, "does not fit"),
        ({"k": 2.5}, "whole number"),
        ({"prefixes": (8, 32)}, "rise to the number"),
        ({"prefixes": (32, 8, 64)}, "rise to the number"),
        ({"activation": "relu", "prefixes": (8, 64)}, "need topk"),
        ({"objective": Objective(sparsity="tanh")}, "has no sparsity penalty"),
        ({"partition": Partition(shared=65)}, "more latents than"),
    ],
)
def test_contradictions_are_refused(changes, problem):
    with pytest.raises(ConfigError, match=problem):
        recipe(**changes)
    assert directions().shape == (48, 24)


def test_one_model_has_no_bound_latents():
    with pytest.raises(ConfigError, match="Only a pair"):
        train_dictionary(stream(2_000), recipe(partition=Partition(shared=3)))
    with pytest.raises(ConfigError, match="negative"):
        Objective(auxk_alpha=-1)
    assert TrainConfig().objective == Objective()
