"""Planted pairs: a direction that only the tuned model writes is found as tuned-only; without one, none is."""

import torch
from torch.nn.functional import normalize

from palimpsest.dictionaries import Partition, TrainConfig, train_dictionary

D_MODEL, SHARED, K = 24, 40, 4
TOKENS = 100_000


def rows(count, seed):
    return normalize(torch.randn(count, D_MODEL, generator=torch.Generator().manual_seed(seed)), dim=1)


def new_direction(seed):
    return rows(1, 1000 + seed)[0]


def pair_stream(seed, *, planted, tokens=TOKENS, piece=1000, turn=0.15):
    """Both models write the same sparse sums, a little differently; the tuned one adds a direction of its own."""
    generator = torch.Generator().manual_seed(seed)
    shared, new = rows(SHARED, 100 + seed), new_direction(seed)
    # A fine-tune moves what it keeps: every shared direction turns a little.
    turned = normalize(shared + turn * rows(SHARED, 500 + seed), dim=1)
    for _ in range(tokens // piece):
        active = torch.rand(piece, SHARED, generator=generator) < 0.07
        values = (torch.rand(piece, SHARED, generator=generator) + 0.5) * active
        base, tuned = values @ shared, values @ turned
        fires = torch.rand(piece, generator=generator) < 0.1
        strength = (torch.rand(piece, generator=generator) + 0.5) * fires
        if planted:
            tuned = tuned + strength[:, None] * new
        yield torch.stack([3 * base + 1, 5 * tuned - 2], dim=1)


def train(seed, *, planted, **changes):
    fields = {
        "n_latents": 64,
        "k": K,
        "activation": "batch_topk",
        "tokens": TOKENS,
        "batch_size": 512,
        "lr": 8e-3,
        "seed": seed,
    }
    stream = pair_stream(seed, planted=planted)
    made = train_dictionary(stream, TrainConfig(**fields | changes))
    alive = torch.cat(list(pair_stream(seed, planted=planted, tokens=8000)))
    counts = torch.bincount(made.encode(alive).indices, minlength=made.n_latents)
    return made, counts > 0


def tuned_only(made, alive):
    """Alive latents that the tuned model alone writes, in units in which both models are equally loud."""
    norms = made.W_dec.norm(dim=2) / made.W_dec.norm(dim=2)[alive].median(dim=0).values
    share = ((norms[:, 1] - norms[:, 0]) / norms.amax(dim=1).clamp(min=1e-12) + 1) / 2
    return (share > 0.9) & alive


def test_a_planted_direction_is_found_in_most_seeds_and_none_without():
    found = 0
    for seed in range(5):
        made, alive = train(seed, planted=True)
        chosen = tuned_only(made, alive)
        cosines = normalize(made.W_dec[chosen, 1], dim=1) @ new_direction(seed)
        found += bool(len(cosines) and cosines.max() > 0.9)
        assert chosen.sum() <= 3
        null, alive = train(seed, planted=False)
        assert not tuned_only(null, alive).any()
    assert found >= 4


def test_bound_latents_stay_bound():
    made, alive = train(0, planted=True, partition=Partition(base_only=2, tuned_only=6, shared=50))
    rows = {name: slice(part.start, part.stop) for name, part in made.partition.items()}
    base, tuned = made.W_dec.unbind(dim=1)
    assert not tuned[rows["base_only"]].any() and not base[rows["tuned_only"]].any()
    assert not made.W_enc[1][:, rows["base_only"]].any() and not made.W_enc[0][:, rows["tuned_only"]].any()
    cosine = torch.cosine_similarity(base[rows["shared"]], tuned[rows["shared"]], dim=1)
    torch.testing.assert_close(cosine, torch.ones(50))
    free = torch.cosine_similarity(base[rows["free"]], tuned[rows["free"]], dim=1)
    assert free[alive[rows["free"]]].min() < 0.999
    new = normalize(tuned, dim=1) @ new_direction(0)
    assert new.max() > 0.9 and int(new.argmax()) not in range(8, 58)


def test_a_diff_sae_finds_the_planted_direction_among_the_turned_ones():
    def differences(planted):
        for pair in pair_stream(3, planted=planted, turn=1.0):
            yield (pair[:, 1] / 5 - pair[:, 0] / 3)[:, None]

    config = TrainConfig(
        n_latents=64, k=K, activation="batch_topk", tokens=TOKENS, batch_size=512, lr=8e-3, view="diff"
    )
    made = train_dictionary(differences(True), config)
    null = train_dictionary(differences(False), config)
    assert made.view == "diff" and made.models == 1
    best = [(normalize(one.W_dec[:, 0], dim=1) @ new_direction(3)).max() for one in (made, null)]
    assert best[0] > 0.9 > 0.7 > best[1]
