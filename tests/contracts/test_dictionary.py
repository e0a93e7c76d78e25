"""One suite that every dictionary must pass, whatever its activation and view."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from safetensors.torch import load_file, save_file

from palimpsest.dictionaries import Codes, Dictionary, TrainConfig, load_dictionary, save_saelens
from palimpsest.dictionaries import dictionary as module
from palimpsest.dictionaries.activations import above, top_k
from palimpsest.errors import ArtifactError, ConfigError, DictionaryError, NumericsError
from random_dictionaries import (
    D_MODEL,
    LATENTS,
    RULES,
    TOKENS,
    VIEWS,
    activations,
    dense_codes,
    dense_output,
    make,
)

every = pytest.mark.parametrize(
    ("activation", "view"), [(rule, view) for rule in RULES for view in VIEWS], ids="-".join
)


@every
@pytest.mark.parametrize("subtract", [True, False])
def test_sparse_equals_dense(activation, view, subtract):
    made = make(activation, view, apply_b_dec_to_input=subtract)
    x = activations(made)
    output, codes = made(x)
    expected = dense_codes(made, x)
    assert output.shape == x.shape and codes.tokens == TOKENS and codes.n_latents == LATENTS
    assert 0 < (expected > 0).sum() < expected.numel() / 1.5
    torch.testing.assert_close(codes.dense().double(), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(output, made.decode(codes).view(x.shape), atol=0, rtol=0)
    torch.testing.assert_close(output.double(), dense_output(made, expected, x.shape), atol=1e-4, rtol=1e-4)
    assert torch.equal(codes.l0(), (expected > 0).sum(1))
    assert ("b_enc" in made.state_dict()) == (activation != "gated")


@every
def test_tiles_change_nothing(activation, view, monkeypatch):
    made = make(activation, view)
    x = activations(made)
    whole = made.encode(x)
    monkeypatch.setattr(module, "TILE_BYTES", 5 * LATENTS * 4)
    tiled = made.encode(x)
    torch.testing.assert_close(tiled.values, whole.values, atol=1e-5, rtol=1e-5)
    assert torch.equal(tiled.indices, whole.indices) and torch.equal(tiled.crow, whole.crow)


@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_what_was_saved_is_what_is_read(activation, view, dtype, tmp_path):
    made = make(activation, view, dtype=dtype, metadata={"site": "resid_post.1", "tokens": 7})
    x = activations(made)
    codes = made.encode(x)
    loaded = Dictionary.from_pretrained(made.save_pretrained(tmp_path / "native"))
    assert loaded.describe() == made.describe() and loaded.site == "resid_post.1" and loaded.dtype == dtype
    assert loaded.state_dict().keys() == made.state_dict().keys()
    readers = [loaded]
    if made.models == 1:
        readers.append(load_dictionary(save_saelens(made, tmp_path / "saelens")))
        assert readers[1].activation == {"batch_topk": "jumprelu"}.get(activation, activation)
    for reader in readers:
        again = reader.encode(x)
        assert torch.equal(again.values, codes.values) and torch.equal(again.indices, codes.indices)
        assert torch.equal(reader.decode(again), made.decode(codes))


@every
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 0.1)], ids=str
)
def test_every_dtype_of_weights_and_input(activation, view, dtype, tolerance):
    exact = make(activation, view, dtype=torch.float64)
    x = activations(exact)
    expected = dense_output(exact, dense_codes(exact, x), x.shape)
    made = make(activation, view, dtype=torch.float64).to(dtype)
    for given_in in (x, x.float()):
        output, codes = made(given_in)
        assert made.dtype == output.dtype == codes.values.dtype == dtype
        error = float((output.double() - expected).norm() / expected.norm())
        assert error < (tolerance if given_in is x else max(tolerance, 1e-5))
    if dtype == torch.bfloat16:
        assert error > 1e-4


@every
def test_gradients_reach_input_and_weights(activation, view):
    made = make(activation, view, dtype=torch.float64).requires_grad_(True)
    x = activations(made).requires_grad_(True)
    output, codes = made(x)
    target = torch.randn(output.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    (output * target).sum().backward()
    twin = make(activation, view, dtype=torch.float64).requires_grad_(True)
    y = x.detach().clone().requires_grad_(True)
    (dense_output(twin, dense_codes(twin, y), y.shape) * target).sum().backward()
    torch.testing.assert_close(x.grad, y.grad)
    assert torch.equal(codes.dense() > 0, dense_codes(twin, y) > 0)
    for name, parameter in made.named_parameters():
        theirs = dict(twin.named_parameters())[name].grad
        assert (parameter.grad is None) == (theirs is None), name
        if theirs is not None:
            torch.testing.assert_close(parameter.grad, theirs, msg=name)


@pytest.mark.parametrize("activation", ["topk", "relu"])
def test_lists_are_ordered_and_strictly_positive(activation):
    made = make(activation)
    codes, dense = made.encode(activations(made)), None
    dense = codes.dense()
    for k in (1, 3, 8):
        top = codes.top(k)
        assert top.values.shape == top.indices.shape == (TOKENS, k)
        for token in range(TOKENS):
            order = sorted(((-v, i) for i, v in enumerate(dense[token].tolist()) if v > 0))[:k]
            assert top.length[token] == len(order)
            assert top.indices[token].tolist() == [i for _, i in order] + [-1] * (k - len(order))
            assert top.values[token].tolist() == [-v for v, _ in order] + [0.0] * (k - len(order))


pre_activations = arrays.arrays(
    np.float32,
    st.tuples(st.integers(1, 6), st.integers(1, 12)),
    elements=st.sampled_from([-1.0, 0.0, 0.5, 1.0, 1.0, 2.0]),
)


@settings(max_examples=200, deadline=None)
@given(pre_activations, st.data())
def test_top_k_settles_ties_like_a_stable_sort(values, data):
    pre = torch.from_numpy(values)
    k = data.draw(st.integers(1, pre.shape[1]))
    best, indices = top_k(pre, k)
    expected = pre.sort(dim=1, descending=True, stable=True)
    positive = expected.values[:, :k] > 0
    assert torch.equal(best, torch.where(positive, expected.values[:, :k], 0))
    assert torch.equal(indices, torch.where(positive, expected.indices[:, :k], 0))


@settings(max_examples=100, deadline=None)
@given(pre_activations, st.sampled_from([None, 0.5, 1.0]))
def test_thresholded_rows_settle_ties_like_a_stable_sort(values, threshold):
    pre = torch.from_numpy(values)
    codes = above(pre, None if threshold is None else torch.full((pre.shape[1],), threshold))
    kept = torch.where(pre > (threshold or 0), pre, 0)
    expected = kept.sort(dim=1, descending=True, stable=True)
    for token in range(pre.shape[0]):
        count = int((kept[token] > 0).sum())
        row = slice(int(codes.crow[token]), int(codes.crow[token + 1]))
        assert codes.indices[row].tolist() == expected.indices[token, :count].tolist()
        assert codes.values[row].tolist() == expected.values[token, :count].tolist()


def test_codes_join_and_expand():
    fixed = Codes.from_fixed(torch.tensor([[2.0, 1.0], [3.0, 0.0]]), torch.tensor([[4, 1], [2, 0]]), 6)
    loose = above(torch.tensor([[0.0, 5.0, 0.0, 1.0, 7.0, 0.0], [-1.0] * 6]), None)
    both = Codes.concatenate([fixed, loose])
    assert both.width is None and both.tokens == 4 and both.l0().tolist() == [2, 1, 3, 0]
    assert torch.equal(both.dense(), torch.cat([fixed.dense(), loose.dense()]))
    assert both.rows().tolist() == [0, 0, 1, 1, 2, 2, 2]
    assert Codes.concatenate([fixed, fixed]).fixed()[1].tolist() == [[4, 1], [2, 0]] * 2
    with pytest.raises(ValueError, match="different length"):
        both.fixed()


def test_no_tokens_at_all():
    for activation in RULES:
        made = make(activation)
        output, codes = made(torch.zeros(0, D_MODEL))
        assert output.shape == (0, D_MODEL) and codes.tokens == 0 and codes.top(3).values.shape == (0, 3)


def test_basis_reads_and_writes_a_projection():
    basis = torch.linalg.qr(torch.randn(D_MODEL, D_MODEL))[0].T.contiguous()
    mean = torch.randn(D_MODEL)
    made = Dictionary.basis(basis, k=D_MODEL, mean=mean)
    x = torch.randn(TOKENS, D_MODEL)
    assert made.n_latents == 2 * D_MODEL
    torch.testing.assert_close(made(x)[0], x, atol=1e-5, rtol=1e-5)
    strongest = Dictionary.basis(basis, k=1, mean=mean).encode(x)
    assert torch.equal(strongest.indices % D_MODEL, ((x - mean) @ basis.T).abs().argmax(1))


def test_random_control_is_seeded():
    first, again, other = (Dictionary.random(D_MODEL, LATENTS, 3, seed=seed) for seed in (5, 5, 6))
    assert torch.equal(first.W_dec, again.W_dec) and not torch.equal(first.W_dec, other.W_dec)
    torch.testing.assert_close(first.W_dec.norm(dim=2), torch.ones(LATENTS, 1))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_not_finite_input_names_its_row(bad):
    made = make()
    x = activations(made)
    x[17, 3] = bad
    with pytest.raises(NumericsError, match="row 17"):
        made.encode(x)


def test_wrong_shapes_and_arguments():
    made = make()
    for x in (torch.zeros(4, D_MODEL + 1), torch.zeros(4, 2, D_MODEL)):
        with pytest.raises(DictionaryError, match="width"):
            made.encode(x)
    with pytest.raises(DictionaryError, match="another dictionary"):
        made.decode(Codes.from_fixed(torch.ones(1, 1), torch.zeros(1, 1, dtype=torch.long), 3))
    for arguments in (
        {"k": 41},
        {"k": 0},
        {"k": None},
        {"k": 2.5},
        {"k": 3, "activation": "gelu"},
        {"k": 3, "view": "left"},
        {"k": 3, "models": 2},
        {"k": 3, "view": "pair"},
        {"k": 3, "prefixes": (10, 20)},
        {"k": 3, "prefixes": (20, 10, 40)},
        {"k": 3, "prefixes": (0, 40)},
        {"k": 3, "prefixes": (10, 10, 40)},
        {"activation": "relu", "prefixes": (10, 40)},
        {"k": 3, "shared": 1},
        {"k": 3, "models": 3, "view": "pair", "shared": 1},
        {"k": 3, "models": 2, "view": "pair", "shared": -1},
        {"k": 3, "models": 2, "view": "pair", "shared": 30, "base_only": 11},
    ):
        with pytest.raises(DictionaryError):
            Dictionary(D_MODEL, 40, **arguments)
    with pytest.raises(TypeError, match="prefix"):
        Dictionary(D_MODEL, 40, k=3, prefix=(10, 40))
    with pytest.raises(ConfigError):
        TrainConfig(batch_size=0)


def test_damaged_folders_are_refused(tmp_path):
    made = make()
    with pytest.raises(DictionaryError, match="no folder"):
        load_dictionary(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DictionaryError, match="no dictionary"):
        load_dictionary(tmp_path / "empty")
    folder = made.save_pretrained(tmp_path / "made")
    with pytest.raises(ArtifactError):
        made.save_pretrained(folder)
    made.save_pretrained(folder, overwrite=True)
    weights = folder / "dictionary.safetensors"
    tensors = load_file(weights)
    save_file({**tensors, "b_enc": tensors["b_enc"] + 1}, weights)
    with pytest.raises(ArtifactError, match="dictionary.safetensors"):
        load_dictionary(folder)


def test_weights_that_are_not_finite_are_refused(tmp_path):
    made = make()
    made.W_enc[0, 0, 0] = float("nan")
    with pytest.raises(DictionaryError, match="W_enc"):
        load_dictionary(made.save_pretrained(tmp_path / "nan"))


def test_hub_ids_need_a_hub(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(DictionaryError, match="hub"):
        load_dictionary("nobody-at-all/no-such-dictionary")
