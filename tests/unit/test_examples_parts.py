"""The pieces of the examples stage: best lists, random samples, half octaves, odds, texts of tokens."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import chisquare

from palimpsest.interpret.examples.best import Best, Lots, runs_of
from palimpsest.interpret.examples.chunks import Chunk
from palimpsest.interpret.examples.cofiring import CoFiring
from palimpsest.interpret.examples.tallies import LOWEST, half_octave
from palimpsest.interpret.examples.vocabulary import token_texts
from palimpsest.interpret.token_odds import log_odds


def fake_chunk(documents, per_document, n_latents=1, corpus=0):
    """A chunk in which every latent fires on every token."""
    slots = documents * per_document
    rng = np.random.default_rng(corpus)
    return Chunk(
        corpus,
        1,
        np.arange(slots, dtype=np.int32) % 50,
        np.zeros(slots, np.uint8),
        np.ones(slots, bool),
        np.arange(documents + 1, dtype=np.int64) * per_document,
        np.arange(documents, dtype=np.int32),
        rng.integers(-(2**62), 2**62, documents),
        np.arange(n_latents + 1, dtype=np.int64) * slots,
        np.tile(np.arange(slots, dtype=np.int32), n_latents),
        (rng.random(slots * n_latents, np.float32) + 0.1,),
    )


def latent_of(chunk):
    return np.repeat(np.arange(len(chunk.pointer) - 1, dtype=np.int32), np.diff(chunk.pointer))


def test_the_sample_is_uniform_over_the_firings():
    chunks = [fake_chunk(30, 3, corpus=number) for number in range(2)]
    drawn = np.zeros((2, 90), int)
    for seed in range(600):
        best, lots = Best(1, 10), Lots(seed, 1)
        for number, chunk in enumerate(chunks):
            latent = latent_of(chunk)
            score = lots.entries(lots.slots(chunk), chunk, latent)
            best.add(number, runs_of(chunk, latent, np.ones(30, bool)), score, chunk.slot)
        _, where, slot = best.rows()
        assert len(set(zip(where.tolist(), (slot // 3).tolist(), strict=True))) == 10
        np.add.at(drawn, (where, slot), 1)
    assert chisquare(drawn.reshape(-1)).pvalue > 1e-3
    assert chisquare(drawn.sum(1)).pvalue > 1e-3
    # A sample that prefers early tokens would not pass.
    biased = drawn.reshape(-1).copy()
    biased[:90] = biased[:90] * 1.2
    assert chisquare(biased * drawn.sum() / biased.sum()).pvalue < 1e-3


def test_latents_are_drawn_for_apart_from_each_other():
    chunk = fake_chunk(200, 1, n_latents=2)
    lots, latent = Lots(0, 2), latent_of(chunk)
    score = lots.entries(lots.slots(chunk), chunk, latent).astype(float).reshape(2, 200)
    assert abs(np.corrcoef(score)[0, 1]) < 0.25
    other = Lots(1, 2)
    again = other.entries(other.slots(chunk), chunk, latent).astype(float).reshape(2, 200)
    assert abs(np.corrcoef(score[0], again[0])[0, 1]) < 0.25


def test_floors_never_lose_a_better_one(monkeypatch):
    from palimpsest.interpret.examples import best as module

    monkeypatch.setattr(module, "PENDING", 7)
    rng = np.random.default_rng(0)
    best, seen = Best(4, 6), []
    for number in range(40):
        chunk = fake_chunk(5, 3, n_latents=4, corpus=number)
        latent = latent_of(chunk)
        score = rng.integers(0, 2**32, len(latent), dtype=np.uint32)
        score[rng.random(len(score)) < 0.3] = 0
        best.add(number, runs_of(chunk, latent, np.ones(5, bool)), score, chunk.slot)
        for one, value, slot in zip(latent, score, chunk.slot, strict=True):
            seen.append((int(one), number, int(slot), int(value)))
    rows = list(zip(*(column.tolist() for column in best.rows()), strict=True))
    for latent in range(4):
        runs: dict = {}
        for one, number, slot, value in seen:
            if one == latent and value > runs.get((number, slot // 3), (0, 0))[0]:
                runs[number, slot // 3] = (value, slot)
        expected = sorted(((value, key[0], slot) for key, (value, slot) in runs.items()), reverse=True)[:6]
        assert [row[1:] for row in rows if row[0] == latent] == [row[1:] for row in expected]


def test_half_octaves():
    values = np.array(
        [1.0, 1.4142135, 1.4142137, 1.9999999, 2.0, 0.70710677, 0.7071069, 0.5, 3e-39], np.float32
    )
    expected = np.floor(2 * np.log2(values.astype(np.float64))).astype(int)
    assert half_octave(values)[:-1].tolist() == expected[:-1].tolist()
    assert half_octave(values)[-1] < LOWEST


def test_a_bounded_sample_of_tokens_estimates_the_same_neighbours():
    rng = np.random.default_rng(0)
    tokens, n = 20_000, 12
    fires = rng.random((tokens, n)) < 0.2
    fires[:, 1] = fires[:, 0] & (rng.random(tokens) < 0.9)
    pointer = np.concatenate([[0], fires.sum(0).cumsum()]).astype(np.int64)
    slot = np.concatenate([np.flatnonzero(fires[:, one]) for one in range(n)]).astype(np.int32)
    whole = fake_chunk(tokens, 1)
    chunk = Chunk(*(getattr(whole, name) for name in list(Chunk.__dataclass_fields__)[:8]), pointer, slot, ())
    sample = CoFiring(n, pairs=30_000)
    sample.add(chunk, Lots(0, n).slots(chunk), latent_of(chunk), np.ones(len(slot), bool))
    assert 1000 < sample.tokens < 10_000
    found = sample.neighbours(3)
    names, scores = (
        [column[found.latent == one] for one in range(n)] for column in (found.item, found.score)
    )
    truth = (fires[:, 0] & fires[:, 1]).sum() / np.sqrt(fires[:, 0].sum() * fires[:, 1].sum())
    assert names[0][0] == 1 and names[1][0] == 0
    assert abs(float(scores[0][0]) - truth) < 0.03


def test_log_odds_of_a_token_at_its_own_frequency_are_zero():
    vocabulary = np.array([500, 300, 200])
    z = log_odds(np.zeros(3, int), np.arange(3), np.array([50, 30, 20]), vocabulary)
    assert np.abs(z).max() < 1e-9
    z = log_odds(np.zeros(2, int), np.arange(2), np.array([20, 80]), vocabulary)
    assert z[0] < 0 < z[1]


def test_a_token_on_which_a_latent_always_fires_comes_first():
    """Of all of a rare token and a fiftieth of a frequent one; also where only some firings are counted."""
    vocabulary = np.array([90, 10_000, 200_000])
    for part in (1, 10):
        z = log_odds(np.zeros(3, int), np.arange(3), np.array([90, 200, 600]) // part, vocabulary)
        assert z[0] > z[1] > 2 > 0 > z[2]


def test_log_odds_of_a_text_of_one_token_are_finite():
    z = log_odds(np.zeros(1, int), np.zeros(1, int), np.array([4]), np.array([4]))
    assert np.isfinite(z).all() and abs(z[0]) < 1


def test_token_texts_of_bytes_and_added_tokens(tiny_tokenizer):
    texts = token_texts(tiny_tokenizer)
    known = tiny_tokenizer.get_vocab()
    assert len(texts) == len(tiny_tokenizer)
    assert texts[known["<s>"]] == "<s>"
    # é is two bytes, a space is Ġ, a newline Ċ.
    ids = tiny_tokenizer("é", add_special_tokens=False)["input_ids"]
    assert "".join(texts[i] for i in ids) in ("é", "\\xc3\\xa9")
    assert texts[known["Ġ"]] == " " and texts[known["Ċ"]] == "\n" and texts[known["ÿ"]] == "\\xff"
    text = "The river runs past the old mill"
    assert (
        "".join(token_texts(tiny_tokenizer, tiny_tokenizer(text, add_special_tokens=False)["input_ids"]))
        == text
    )
    assert all(one.encode() for one in texts)


def test_token_texts_of_sentencepiece():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    pieces = ["<unk>", "<s>", "<0xE6>", "<0x41>", "▁river", "ing", "▁", "Ġodd"]
    inner = Tokenizer(models.Unigram([(piece, -1.0) for piece in pieces], 0, byte_fallback=True))
    inner.pre_tokenizer = pre_tokenizers.Metaspace()
    inner.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", unk_token="<unk>")
    assert token_texts(tokenizer) == ["<unk>", "<s>", "\\xe6", "A", " river", "ing", " ", "Ġodd"]


def test_a_vocabulary_with_holes_is_named_to_its_end():
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.WordLevel({"<unk>": 0, "mill": 1, "river": 7}, "<unk>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>")
    assert token_texts(tokenizer) == ["<unk>", "mill", *(f"⟨{number}⟩" for number in range(2, 7)), "river"]


@pytest.mark.parametrize("number", [-1, 10**6])
def test_an_id_without_a_token_is_a_number(tiny_tokenizer, number):
    class Holes:
        added_tokens_decoder: dict = {}
        backend_tokenizer = tiny_tokenizer.backend_tokenizer

        def convert_ids_to_tokens(self, _):
            return None

    assert token_texts(Holes(), [number]) == [f"⟨{number}⟩"]
