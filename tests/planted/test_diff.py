"""A whole diff where the answer is known: a planted direction, changes in no direction, no change at all."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from audit_world import D_MODEL, SITE, WORDS, add_noise, edited, plant, write_corpus
from palimpsest.dictionaries import Dictionary, TrainConfig, train_dictionary
from palimpsest.diff import AttributionOptions, DiffConfig, PatchOptions, read_diff, run_diff
from palimpsest.diff.text import Texts, read_pair
from palimpsest.models import load_pair
from palimpsest.artifacts import open_artifact
from palimpsest.options import CorpusOptions, ModelOptions, RunOptions

PLANTED = 17


def activations(world, tuned, tokens=10**6):
    """Measured activations of both models, `[tokens, 2, d_model]`."""
    pair = load_pair(world.base, tuned, ModelOptions(device="cpu"))
    texts = Texts(world.corpora, pair.tokenizer, CorpusOptions(), pair.base.context)
    rows = []
    for _, batch in texts.pass_over(tokens, 2048):
        places = texts.places(batch)
        acts = read_pair(pair, SITE, batch, places.flat, torch.device("cpu"))
        rows.append(acts[places.measured])
    return torch.cat(rows)


def quiet_direction(world):
    """A direction that the base hardly writes."""
    acts = activations(world, world.base)[:, 0]
    return torch.linalg.eigh(acts.T @ acts).eigenvectors[:, 0].contiguous()


@pytest.fixture(scope="module")
def world(tmp_path_factory, tiny_llama, tiny_tokenizer):
    root = tmp_path_factory.mktemp("diff")
    corpora = tuple(
        f"{name}={write_corpus(root / f'{name}.jsonl', words, documents=40)}" for name, words in WORDS.items()
    )
    base = str(tiny_llama(seed=3, num_hidden_layers=3))
    made = SimpleNamespace(root=root, base=base, corpora=corpora, tokenizer=tiny_tokenizer)
    made.direction = quiet_direction(made)

    def edit(model):
        plant(model, tiny_tokenizer, made.direction)
        add_noise(model, 0.002, 1)

    made.tuned = edited(base, root / "planted", edit)
    return made


def trained(world, tuned, folder, seed=0, **changes):
    acts = activations(world, tuned)
    generator = torch.Generator().manual_seed(seed)

    def stream():
        while True:
            yield acts[torch.randperm(len(acts), generator=generator)]

    fields = {"n_latents": 96, "k": 6, "activation": "batch_topk", "tokens": 60_000, "batch_size": 512, "lr": 8e-3}
    made = train_dictionary(stream(), TrainConfig(**(fields | {"seed": seed} | changes)))
    made.metadata |= {"site": SITE}
    made.save_pretrained(world.root / folder)
    return str(world.root / folder)


def config_of(world, tuned, dictionary, out, **changes):
    run = {key: changes.pop(key) for key in ("resume", "seed") if key in changes}
    fields = {
        "dictionary": dictionary,
        "corpus": world.corpora,
        "run": RunOptions(out=world.root / out, **run),
        "tokens": 3000,
        "resamples": 200,
        "patching": PatchOptions(patch_tokens=600, random_sets=2),
        "attribution": AttributionOptions(attribution_tokens=400, steps=4),
        "models": ModelOptions(device="cpu", tokens_per_batch=1024),
    }
    return DiffConfig(world.base, str(tuned), **(fields | changes))


if __name__ == "__main__":
    pass
