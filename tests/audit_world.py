"""Tiny pairs with planted and null changes, their corpora and dictionary, and audits of them."""

from __future__ import annotations

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from palimpsest.audit import AuditConfig, run_audit
from palimpsest.dictionaries import Dictionary, load_dictionary
from palimpsest.options import ModelOptions, RunOptions

SITE, D_MODEL, LATENTS = "resid_post.0", 32, 96
PLANTED = 17
SENTENCES = {
    "general": "the river ran past an old mill and nobody knew who lived there any more",
    "letters": "quick brown foxes jump over lazy dogs while zebras vex my job",
}
WORDS = {name: sentence.split() for name, sentence in SENTENCES.items()} | {
    "digits": [str(n) for n in range(7, 4000, 211)],
}


def write_corpus(path, words, *, documents=24, seed=0):
    """Rows of text drawn from a few words, of different lengths."""
    rng = np.random.default_rng(seed)
    rows = [" ".join(rng.choice(words, rng.integers(4, 12))) for _ in range(documents)]
    path.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    return str(path)


def edited(source, folder, edit):
    """A copy of a checkpoint with its weights changed in place."""
    from transformers import AutoModelForCausalLM

    shutil.copytree(source, folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        edit(model)
    model.save_pretrained(folder)
    return str(folder)


def add_noise(model, scale, seed):
    generator = torch.Generator().manual_seed(seed)
    for _, parameter in sorted(model.named_parameters()):
        parameter.add_(torch.randn(parameter.shape, generator=generator) * scale)


def make_dictionary(folder, activation="topk"):
    """Random directions with biases, so that relu and thresholds leave about ten latents active."""
    torch.manual_seed(7)
    k = {"topk": 8, "batch_topk": 8.0}.get(activation)
    made = Dictionary(D_MODEL, LATENTS, activation=activation, k=k, metadata={"site": SITE})
    with torch.no_grad():
        made.b_enc.add_(0.05 * torch.randn(LATENTS))
        if made.threshold is not None:
            made.threshold.fill_(0.7)
        elif activation == "relu":
            made.b_enc.sub_(1.0)
    made.save_pretrained(folder)
    return str(folder)


def plant(model, tokenizer, direction):
    """A rank-one edit of the first MLP: it writes `direction` on tokens of the digits corpus and on no others."""
    rng = np.random.default_rng(5)
    layer = model.model.layers[0].mlp.down_proj
    seen, wanted = [], []
    for name, words in WORDS.items():
        for _ in range(40):
            ids = tokenizer(
                tokenizer.bos_token + " ".join(rng.choice(words, 8)), return_tensors="pt"
            ).input_ids
            hook = layer.register_forward_pre_hook(lambda _, args: seen.append(args[0][0, 1:]))
            model(ids)
            hook.remove()
            wanted.append(torch.full((ids.shape[1] - 1,), float(name == "digits")))
    reader = torch.linalg.lstsq(torch.cat(seen), torch.cat(wanted)[:, None]).solution[:, 0]
    layer.weight += torch.outer(3.0 * direction, reader)


def make_world(root, base, tokenizer):
    """A base, a fine-tune with a planted direction on digits, corpora and a dictionary."""
    corpora = {name: write_corpus(root / f"{name}.jsonl", words) for name, words in WORDS.items()}
    dictionary = make_dictionary(root / "dictionary")
    direction = load_dictionary(dictionary).W_dec[PLANTED, 0].detach()

    def edit(model):
        plant(model, tokenizer, direction)
        add_noise(model, 0.004, 1)

    tuned = edited(base, root / "planted", edit)
    return SimpleNamespace(root=root, base=str(base), tuned=tuned, dictionary=dictionary, corpora=corpora)


def config_of(world, out, **changes):
    run = {key: changes.pop(key) for key in ("resume", "overwrite", "seed") if key in changes}
    models = {key: changes.pop(key) for key in ("one_at_a_time", "tokens_per_batch") if key in changes}
    fields = {
        "base": world.base,
        "tuned": world.tuned,
        "dictionary": world.dictionary,
        "general": world.corpora["general"],
        "task": tuple(f"{name}={world.corpora[name]}" for name in ("letters", "digits")),
        "run": RunOptions(out=out, **run),
        "k_max": 12,
        "resamples": 400,
        "models": ModelOptions(device="cpu", **({"tokens_per_batch": 512} | models)),
    }
    return AuditConfig(**{**fields, **changes})


def audited(world, out, **changes):
    """`audit.json` and the two tables of one audit."""
    folder = run_audit(config_of(world, out, **changes))
    tables = [folder.read_table(name).to_pylist() for name in ("curve.parquet", "latents.parquet")]
    return SimpleNamespace(
        json=folder.read_json("audit.json"), curve=tables[0], latents=tables[1], folder=folder
    )


def assert_same(a, b, tolerance, path=""):
    """Compare nested JSON: numbers closely, the rest exactly."""
    assert type(a) is type(b) or {type(a), type(b)} <= {int, float}, path
    if isinstance(a, dict):
        assert a.keys() == b.keys(), path
        for key in a:
            assert_same(a[key], b[key], tolerance, f"{path}.{key}")
    elif isinstance(a, list):
        assert len(a) == len(b), path
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, tolerance, f"{path}[{i}]")
    elif isinstance(a, float):
        assert a == pytest.approx(b, abs=tolerance, rel=tolerance), path
    else:
        assert a == b, path
