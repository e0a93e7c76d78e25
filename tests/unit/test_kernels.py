"""Sparse kernels: each primitive against a dense float64 reference, on every backend that CPUs have."""

import logging
import os
import subprocess
import sys
import threading

import pytest
import torch

from palimpsest.dictionaries import kernels
from palimpsest.dictionaries.kernels import build, native
from palimpsest.errors import ConfigError

BACKENDS = ("torch", "native")
SIZES = [(7, 5, 3), (33, 37, 96), (20, 64, 517), (65, 130, 1024)]
"""Tokens, features, latents: no multiples of a vector, fewer latents than groups, and many."""


@pytest.fixture(params=BACKENDS)
def backend(request):
    if request.param == "native" and not native.available():
        pytest.skip("the C++ kernels cannot be built here: no compiler")
    with kernels.use(request.param):
        yield request.param


def problem(tokens, features, latents, offset=0.0):
    x, weight = torch.randn(tokens, features), torch.randn(latents, features) / features**0.5
    return x, weight, 0.3 * torch.randn(latents) + offset


def whole(x, weight, bias):
    return (x.double() @ weight.double().T + bias.double()).float()


def entries(tokens, latents, most=9):
    counts = torch.randint(0, most, (tokens,))
    counts[tokens // 2] = 0
    crow = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
    value = torch.randn(int(crow[-1])) * (torch.rand(int(crow[-1])) > 0.2)
    return crow, torch.randint(0, latents, (int(crow[-1]),)), value


def token_of(crow):
    return torch.arange(crow.shape[0] - 1).repeat_interleave(crow.diff())


def dense(sparse, latents):
    full = torch.zeros(sparse.crow.shape[0] - 1, latents)
    full[token_of(sparse.crow), sparse.index] = sparse.value
    return full


@pytest.mark.parametrize(("tokens", "features", "latents"), SIZES)
def test_sums_and_products_of_rows(backend, tokens, features, latents):
    x, weight, _ = problem(tokens, features, latents)
    crow, index, value = entries(tokens, latents)
    token = token_of(crow)
    expected = torch.zeros(tokens, features, dtype=torch.float64)
    expected.index_add_(0, token, value.double()[:, None] * weight.double()[index])
    torch.testing.assert_close(kernels.row_sum(crow, index, value, weight).double(), expected)
    products = (x.double()[token] * weight.double()[index]).sum(dim=1)
    torch.testing.assert_close(
        kernels.row_dot(crow, index, x, weight).double(), products, atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize(("tokens", "latents"), [(7, 3), (200, 50), (40, 70_000)])
def test_by_latent_is_a_stable_sort(backend, tokens, latents):
    crow, index, _ = entries(tokens, latents)
    grouped = kernels.by_latent(crow, index, latents)
    expected = torch.sort(index, stable=True).indices
    assert torch.equal(grouped.place, expected)
    assert torch.equal(grouped.token, token_of(crow)[expected])
    assert torch.equal(grouped.crow.diff(), torch.bincount(index, minlength=latents))


def test_nothing_selected(backend):
    crow, index, value = torch.zeros(5, dtype=torch.long), torch.zeros(0, dtype=torch.long), torch.zeros(0)
    x, weight, bias = problem(4, 6, 40, offset=-1e3)
    assert torch.equal(kernels.row_sum(crow, index, value, weight), torch.zeros(4, 6))
    assert kernels.row_dot(crow, index, x, weight).shape == (0,)
    assert torch.equal(kernels.by_latent(crow, index, 40).crow, torch.zeros(41, dtype=torch.long))
    values, latents = kernels.encode_topk(x, weight, bias, 3)
    assert not values.any() and not latents.any()
    sparse, smallest = kernels.encode_batch_topk(x, weight, bias, 9)
    assert sparse.index.numel() == 0 and torch.equal(sparse.crow, crow) and smallest == torch.inf
    assert kernels.encode_above(x, weight, bias, torch.zeros(40)).index.numel() == 0
    assert kernels.encode_topk(x[:0], weight, bias, 3)[0].shape == (0, 3)


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize(("tokens", "features", "latents"), SIZES)
def test_topk(backend, tokens, features, latents, scaled):
    x, weight, bias = problem(tokens, features, latents)
    scale = 0.2 + torch.rand(latents) if scaled else None
    pre = whole(x, weight, bias)
    for k in sorted({1, min(32, latents), latents}):
        value, index = kernels.encode_topk(x, weight, bias, k, scale=scale, exact=True)
        score = pre if scale is None else pre * scale
        best, place = score.topk(k, dim=1)
        expected = torch.where(best > 0, pre.gather(1, place), 0)
        torch.testing.assert_close(value, expected, atol=1e-5, rtol=1e-5)
        # Scores that rounding can swap may stand in either order, so latents are compared through theirs.
        assert (index == place.masked_fill(best <= 0, 0)).float().mean() > 0.99
        assert not index[best <= 0].any()
        torch.testing.assert_close(score.gather(1, index)[best > 0], best[best > 0], atol=1e-5, rtol=1e-5)
        assert all(
            row[kept].unique().numel() == kept.sum() for row, kept in zip(index, best > 0, strict=True)
        )


def test_ties_go_to_the_smaller_latent(backend):
    x, weight, bias = problem(50, 16, 64)
    copies = torch.arange(64).repeat(9)[torch.randperm(576)]
    weight, bias = weight[copies], bias[copies]
    pre = whole(x, weight, bias)
    order = pre.sort(dim=1, descending=True, stable=True)
    # A tie is one of bits: the copies' products must come out equal, as those of one GEMM do.
    value, index = kernels.encode_topk(x, weight, bias, 40, exact=True)
    best = order.values[:, :40]
    assert torch.equal(index, order.indices[:, :40].masked_fill(best <= 0, 0))
    torch.testing.assert_close(value, best.relu(), atol=1e-5, rtol=1e-5)
    above = kernels.encode_above(x, weight, bias, torch.full((576,), -1.0))
    count = (order.values > 0).sum(dim=1)
    assert torch.equal(above.crow.diff(), count)
    assert torch.equal(above.index, order.indices[torch.arange(576) < count[:, None]])


@pytest.mark.parametrize("precision", kernels.PRECISIONS)
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("count", [0, 1, 400, 10**6])
def test_batch_topk_whatever_the_guess(backend, count, scaled, precision):
    x, weight, bias = problem(65, 37, 130)
    scale = 0.2 + torch.rand(130) if scaled else None
    pre = whole(x, weight, bias)
    score = pre if scale is None else pre * scale
    cut = score.flatten().sort(descending=True).values[min(count, 65 * 130) - 1] if count else torch.inf
    expected = torch.where((score >= cut) & (score > 0), pre, 0)
    # Where every positive score is wanted, bf16 may miss some that are nearly 0.
    near = 0.02 if precision == "bfloat16" and count > pre.numel() else 1e-5
    results = []
    for guess in (None, -1.0, 0.0, 0.9 * float(cut), float(cut), 1.1 * float(cut), 1e6, torch.inf):
        sparse, smallest = kernels.encode_batch_topk(
            x, weight, bias, count, scale=scale, guess=guess, precision=precision
        )
        torch.testing.assert_close(dense(sparse, 130), expected, atol=near, rtol=1e-5)
        inside = token_of(sparse.crow).diff() == 0
        assert (sparse.index.diff()[inside] > 0).all()
        kept = score[expected != 0]
        assert smallest == torch.inf if not kept.numel() else abs(float(smallest - kept.min())) < near
        results.append((*sparse, smallest))
    for result in results[1:]:
        assert all(torch.equal(*pair) for pair in zip(result, results[0], strict=True))


def test_batch_topk_keeps_the_earliest_of_equal_scores(backend):
    x, weight, bias = torch.ones(40, 8), torch.ones(64, 8), torch.zeros(64)
    for guess in (None, 7.0, 8.0, 9.0):
        sparse, smallest = kernels.encode_batch_topk(x, weight, bias, 100, guess=guess)
        assert torch.equal(token_of(sparse.crow) * 64 + sparse.index, torch.arange(100))
        assert smallest == 8


@pytest.mark.parametrize(("tokens", "features", "latents"), SIZES)
def test_above(backend, tokens, features, latents):
    x, weight, bias = problem(tokens, features, latents)
    threshold = torch.randn(latents)
    sparse = kernels.encode_above(x, weight, bias, threshold)
    pre = whole(x, weight, bias)
    expected = torch.where(pre > threshold.clamp(min=0), pre, 0)
    torch.testing.assert_close(dense(sparse, latents), expected, atol=1e-5, rtol=1e-5)
    inside = token_of(sparse.crow).diff() == 0
    assert (sparse.value.diff()[inside] <= 0).all()


def test_tiles_do_not_show(backend, monkeypatch):
    x, weight, bias = problem(90, 24, 256)
    inputs = x, weight, bias

    def run():
        topk = kernels.encode_topk(*inputs, 12, exact=True)
        batch, smallest = kernels.encode_batch_topk(*inputs, 700)
        return (*topk, *batch, smallest, *kernels.encode_above(*inputs, torch.full((256,), 0.5)))

    before = run()
    monkeypatch.setattr(kernels.torch_ops, "TILE_BYTES", 7 * 1024)
    monkeypatch.setattr(kernels.torch_ops, "LEAST_ROWS", 1)
    for found, expected in zip(run(), before, strict=True):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def learned(batch, features, latents):
    """Sums of directions plus noise, and an encoder that has half learned them."""
    directions = torch.nn.functional.normalize(torch.randn(latents, features), dim=1)
    x = (directions[torch.randint(0, latents, (batch, 24))] * torch.rand(batch, 24, 1)).sum(dim=1)
    x = 3 * x + 0.2 * torch.randn(batch, features)
    return x, directions + 0.5 * torch.randn(latents, features) / features**0.5, 0.1 * torch.randn(latents)


def test_bf16_selects_as_fp32_does(backend):
    x, weight, bias = learned(512, 128, 2048)
    kept = []
    for precision in kernels.PRECISIONS:
        value, index = kernels.encode_topk(x, weight, bias, 32, precision=precision)
        batch, _ = kernels.encode_batch_topk(x, weight, bias, 32 * 512, precision=precision)
        kept.append((torch.zeros(512, 2048).scatter_(1, index, value), dense(batch, 2048)))
    for exact, rough in zip(*kept, strict=True):
        both = (exact > 0) & (rough > 0)
        assert both.sum() >= 0.999 * (exact > 0).sum()
        torch.testing.assert_close(rough[both], exact[both], atol=1e-4, rtol=1e-5)


def test_the_bf16_gemm_alone_would_not_do():
    x, weight, bias = learned(512, 128, 2048)
    exact = whole(x, weight, bias).topk(32, dim=1).indices
    rough = ((x.bfloat16() @ weight.bfloat16().T) + bias).topk(32, dim=1).indices
    agreed = (exact[:, :, None] == rough[:, None]).any(dim=2).float().mean()
    assert agreed < 0.999


def test_backends_select_the_same_bits():
    if not native.available():
        pytest.skip("the C++ kernels cannot be built here: no compiler")
    x, weight, bias = problem(100, 48, 700)
    results = []
    for name in BACKENDS:
        with kernels.use(name):
            topk = kernels.encode_topk(x, weight, bias, 20, exact=True)
            batch, smallest = kernels.encode_batch_topk(x, weight, bias, 900)
            results.append((*topk, *batch, smallest, *kernels.encode_above(x, weight, bias, bias.abs())))
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


def test_nan_and_infinity_do_no_harm(backend):
    x, weight, bias = problem(6, 8, 300)
    x[1], bias[7], bias[9] = torch.nan, torch.nan, torch.inf
    value, index = kernels.encode_topk(x, weight, bias, 5)
    assert not torch.isnan(value).any() and (value[0] > 0).any() and index.max() < 300
    sparse, _ = kernels.encode_batch_topk(x, weight, bias, 20)
    assert 7 not in sparse.index and (sparse.index == 9).sum() == 5


@pytest.mark.parametrize("threads", [2, 3])
def test_any_number_of_threads_gives_the_same_result(threads):
    if not native.available():
        pytest.skip("the C++ kernels cannot be built here: no compiler")
    x, weight, bias = problem(300, 40, 512)
    crow, index, value = entries(300, 512, most=40)

    def run():
        with kernels.use("native"):
            return (
                kernels.row_sum(crow, index, value, weight),
                kernels.row_dot(crow, index, x, weight),
                *kernels.by_latent(crow, index, 512),
                *kernels.encode_topk(x, weight, bias, 9),
                *kernels.encode_batch_topk(x, weight, bias, 2000, guess=0.1)[0],
            )

    expected = run()
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = run()
    finally:
        torch.set_num_threads(before)
    # The GEMM's own rounding may change with its threads; the sparse parts may not.
    assert all(torch.equal(*pair) for pair in zip(found[:5], expected[:5], strict=True))
    for one, other in zip(found[5:], expected[5:], strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


def test_several_python_threads_at_once(backend):
    problems = [problem(64, 32, 256) for _ in range(4)]
    expected = [kernels.encode_topk(*p, 8) for p in problems]
    found = [None] * 4

    def work(i):
        for _ in range(5):
            found[i] = kernels.encode_topk(*problems[i], 8)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one[0], other[0])


def test_rows_are_normalised_and_projected_in_place(backend):
    rows, gradient = torch.randn(70, 37), torch.randn(70, 37)
    rows[3] = 0
    unit = torch.nn.functional.normalize(rows.double(), dim=1)
    along = (gradient.double() * unit).sum(dim=1, keepdim=True)
    expected = gradient.double() - along * unit
    assert kernels.normalise_rows_(rows) is rows
    torch.testing.assert_close(rows.double(), unit, atol=1e-6, rtol=1e-6)
    assert kernels.project_rows_(gradient, rows) is gradient
    torch.testing.assert_close(gradient.double(), expected, atol=1e-5, rtol=1e-5)


def test_an_index_out_of_range_is_an_error_not_a_crash():
    if not native.available():
        pytest.skip("the C++ kernels cannot be built here: no compiler")
    crow, index = torch.tensor([0, 1]), torch.tensor([5])
    with kernels.use("native"), pytest.raises(IndexError):
        kernels.row_sum(crow, index, torch.ones(1), torch.ones(5, 4))
    with kernels.use("native"), pytest.raises(IndexError):
        kernels.by_latent(crow, index, 5)


def test_the_backend_can_be_chosen(monkeypatch):
    for name in BACKENDS:
        if name == "native" and not native.available():
            continue
        monkeypatch.setenv("PALIMPSEST_KERNELS", name)
        assert kernels.backend("cpu") == name
        assert kernels.backend("cpu", torch.float64) == "torch"
    monkeypatch.setenv("PALIMPSEST_KERNELS", "torch")
    with kernels.use("auto"):
        assert kernels.backend("cpu") == ("native" if native.available() else "torch")
    assert kernels.backend("cpu") == "torch"
    monkeypatch.setenv("PALIMPSEST_KERNELS", "cuda")
    with pytest.raises(ConfigError, match="PALIMPSEST_KERNELS"):
        kernels.backend("cpu")
    with pytest.raises(ConfigError, match="native"), kernels.use("openmp"):
        pass
    with pytest.raises(ConfigError, match="precision"):
        kernels.encode_topk(*problem(2, 3, 4), 1, precision="float16")


def test_without_a_compiler_pytorch_does_it(tmp_path):
    program = (
        "import logging, torch; logging.basicConfig(level='INFO')\n"
        "from palimpsest.dictionaries import kernels\n"
        "print(kernels.backend('cpu'), kernels.encode_topk(torch.eye(3), torch.eye(3), torch.zeros(3), 1))\n"
        "kernels.backend('cpu')"
    )
    environment = os.environ | {"CXX": "/no/such/compiler", "TORCH_EXTENSIONS_DIR": str(tmp_path)}
    environment.pop("PALIMPSEST_KERNELS", None)
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("torch (tensor")
    assert done.stderr.count("C++ kernels are not available") == 1


def test_a_damaged_library_is_built_again(tmp_path, monkeypatch, caplog):
    if not native.available():
        pytest.skip("the C++ kernels cannot be built here: no compiler")
    built = next(build._folder().glob("palimpsest_sparse_*.so"))
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    folder = build._folder()
    folder.mkdir()
    target = folder / f"palimpsest_sparse_{build._fingerprint()}.so"
    target.write_bytes(built.read_bytes()[:5000])
    build._checksum(target).write_text("0" * 64)
    made = []
    monkeypatch.setattr(build, "_build", lambda path: (made.append(path), _install(built, path)))
    with caplog.at_level(logging.INFO, logger="palimpsest"):
        assert build.library() is not None
        assert build.library() is not None
    assert made == [target]
    assert "compiling" in caplog.text


def _install(built, target):
    target.unlink()
    target.write_bytes(built.read_bytes())
    build._checksum(target).write_text(build._checksum(built).read_text())


def test_a_failed_build_leaves_one_line(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setattr(build, "SOURCE", tmp_path / "broken.cpp")
    build.SOURCE.write_text("this is not C++")
    with caplog.at_level(logging.INFO, logger="palimpsest"):
        assert build.library() is None
    assert sum("not available" in record.message for record in caplog.records) == 1
    assert not list(tmp_path.rglob("*.so"))


@pytest.mark.skipif(not native.available(), reason="the C++ kernels cannot be built here: no compiler")
def test_native_kernels_take_nothing_for_what_it_is_not():
    """C++ reads raw memory: another type, place or length is refused or goes to PyTorch."""
    x, weight, bias = torch.randn(5, 8), torch.randn(12, 8), torch.randn(12)
    value, index = (part.reshape(-1) for part in kernels.encode_topk(x, weight, bias, 3))
    crow = torch.arange(6) * 3
    for arguments in (
        (crow.int(), index, value, weight),
        (crow, index.int(), value, weight),
        (crow, index, value.double(), weight),
        (crow * 2, index, value, weight),
        (crow, index, value[:-1], weight),
    ):
        with pytest.raises((TypeError, ValueError)):
            kernels.row_sum(*arguments)
    with pytest.raises((TypeError, ValueError)):
        kernels.encode_topk(x, weight, bias[:1], 3)
    rows = torch.randn(3, 4).bfloat16()
    torch.testing.assert_close(
        kernels.normalise_rows_(rows.clone()).norm(dim=1).float(), torch.ones(3), atol=1e-2, rtol=0
    )
    halves = kernels.encode_topk(x.bfloat16(), weight.bfloat16(), bias.bfloat16(), 3)
    assert halves[0].dtype == torch.bfloat16
