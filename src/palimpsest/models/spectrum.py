"""Random changes with a fine-tune's own singular values: base + α·Q_L ΔW Q_Rᵀ, at any size α."""

import hashlib
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from palimpsest.errors import NumericsError, PairError
from palimpsest.models.pair import LanguageModel, ModelPair
from palimpsest.models.weights import adapter_deltas, edits_activations, is_adapter, plain_name

DOUBLINGS = 10
"""How often α is doubled, or halved, before the value looked for is given up."""


def base_deltas(pair: ModelPair) -> dict[str, Float[Tensor, "..."]]:
    """What the fine-tune added to every weight of the base, in float32; unchanged weights are left out.

    An adapter counts as what merging it would add. Where the tuned model has another vocabulary, the delta
    covers the rows that both have.

    Returns:
        Deltas by the name that the weight has in the base without any adapter.

    Raises:
        NumericsError: When no weight differs, or a difference is not finite.
    """
    if edits_activations(pair.tuned):
        raise NumericsError(
            f"{pair.tuned.name} edits activations and changes no weight: there is no weight change to rotate at random",
            fix="Leave out the random changes, and judge it by trained nulls (`palimpsest battery calibrate`)",
        )
    deltas: dict[str, Tensor] = {}

    def add(name: str, weight: Tensor, delta: Tensor) -> None:
        if delta.any():
            deltas[plain_name(name)] = delta.detach().to(weight.device)

    # Not inference mode: the tensors outlive the block and are used outside of it.
    with torch.inference_mode(False), torch.no_grad():
        if pair.kind == "adapter":
            adapter_deltas(pair.tuned, add)
        else:
            _checkpoint_deltas(pair, add)
    _check_deltas(deltas)
    return deltas


def _checkpoint_deltas(pair: ModelPair, add: Callable[[str, Tensor, Tensor], None]) -> None:
    kept = {
        # A pair that is held one at a time has room for one on its device.
        name: weight.detach().cpu() if pair.one_at_a_time else weight.detach()
        for name, weight in pair.base.model.named_parameters()
    }
    # A head that is the embeddings in the tuned model only is still listed under its own name.
    others = dict(pair.tuned.model.named_parameters(remove_duplicate=False))
    for name, weight in kept.items():
        other = others.get(name)
        if other is None or other.dim() != weight.dim():
            continue
        shared = tuple(slice(0, min(a, b)) for a, b in zip(weight.shape, other.shape, strict=True))
        add(name, weight, other[shared].detach().to(weight.device).float() - weight[shared].float())


def _check_deltas(deltas: dict[str, Tensor]) -> None:
    if not any(bool(delta.any()) for delta in deltas.values()):
        raise NumericsError(
            "The base and the tuned model have the same weights, so there is no change to draw random ones from",
            fix="Name the fine-tune as the second model, or leave out the random changes",
        )
    for name, delta in deltas.items():
        if not delta.isfinite().all():
            raise NumericsError(f"The change of {name} is not finite", found="NaN or infinity in a weight")


class SpectrumNull:
    """One random change of a base with the sizes, and nothing of the directions, of a fine-tune's.

    Matrices are rotated on both sides (Haar), the rows of embeddings and of the head are permuted, and so are
    the entries of norm gains and biases: each weight keeps the singular values or the values of its change.

    Attributes:
        rotated: The changes at α = 1, by plain weight name.
    """

    def __init__(self, model: LanguageModel, deltas: dict[str, Tensor], seed: int) -> None:
        """Draw the rotations.

        Args:
            model: The base, or the base side of an adapter pair.
            deltas: From `base_deltas`.
            seed: Decides every rotation, on every device alike.

        Raises:
            NumericsError: When the deltas are zero everywhere or not finite.
            PairError: When they belong to another model, or a weight to change is quantised.
        """
        if model.adapter_on:
            raise ValueError("a spectrum null changes the base side of an adapter pair")
        _check_deltas(deltas)
        parameters = {
            plain_name(name): parameter
            for name, parameter in model.model.named_parameters()
            if not is_adapter(name, model.adapter_prefix)
        }
        for name, delta in deltas.items():
            _check_weight(model, name, parameters.get(name), delta)
        self._weights: dict[str, nn.Parameter] = {name: parameters[name] for name in deltas}
        tables = {id(m.weight) for m in model.model.modules() if isinstance(m, nn.Embedding)}
        tables.add(id(model.head.module.weight))
        with torch.inference_mode(False), torch.no_grad():
            self.rotated: dict[str, Tensor] = {
                name: _randomized(
                    deltas[name].to(weight.device), _generator(seed, name), rows=id(weight) in tables
                )
                for name, weight in self._weights.items()
            }

    @contextmanager
    def at(self, alpha: float) -> Iterator[None]:
        """The model with its weights at base + α·rotated inside the block, and bit for bit restored after it."""
        before = [(weight, weight.data) for weight in self._weights.values()]
        try:
            with torch.inference_mode(False), torch.no_grad():
                for name, weight in self._weights.items():
                    change = self.rotated[name]
                    moved = weight.data.to(torch.float32, copy=True)
                    moved[tuple(slice(0, n) for n in change.shape)].add_(change, alpha=alpha)
                    weight.data = moved.to(weight.dtype)
            yield
        finally:
            for weight, data in before:
                weight.data = data


def _check_weight(model: LanguageModel, name: str, weight: nn.Parameter | None, delta: Tensor) -> None:
    if weight is not None and not weight.is_floating_point():
        raise PairError(
            f"The weights of {model.name} are quantised and cannot be changed at random",
            found=f"{weight.dtype} in {name}",
            fix="Load the base unquantised, or leave out the random changes",
        )
    fits = weight is not None and weight.dim() == delta.dim()
    if weight is None or not fits or any(a > b for a, b in zip(delta.shape, weight.shape, strict=True)):
        raise PairError(
            f"The weight changes are not changes of {model.name}",
            expected=f"{name} of at least {tuple(delta.shape)}",
            found="no such weight" if weight is None else tuple(weight.shape),
        )


def _generator(seed: int, name: str) -> torch.Generator:
    """One stream per weight, so that no draw depends on the order or the device of the others."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def _randomized(delta: Tensor, generator: torch.Generator, *, rows: bool) -> Tensor:
    delta = delta.float()
    if delta.dim() < 2:
        flat = delta.reshape(-1)
        return flat[_permutation(flat, generator)].view_as(delta)
    if rows:
        return delta[_permutation(delta, generator)]
    if delta.dim() > 2:  # a stack, such as a layer's experts
        return torch.stack([_randomized(part, generator, rows=False) for part in delta])
    return _rotated(delta, generator)


def _permutation(values: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randperm(len(values), generator=generator).to(values.device)


def _rotated(
    delta: Float[Tensor, "rows columns"], generator: torch.Generator
) -> Float[Tensor, "rows columns"]:
    """Q_L ΔW Q_Rᵀ with independent Haar rotations.

    Of ΔW = Q·R with orthonormal columns in Q, Q_L·Q is as random as Q_L is: only the columns of Q_L that R meets
    are drawn, which spares the long side's square.
    """
    if delta.shape[0] < delta.shape[1]:
        return _rotated(delta.T, generator).T
    core = torch.linalg.qr(delta, mode="r").R
    left, right = _orthonormal(delta, generator), _orthonormal(core, generator)
    return left @ core @ right.T


def _orthonormal(
    like: Float[Tensor, "rows columns"], generator: torch.Generator
) -> Float[Tensor, "rows columns"]:
    """Orthonormal columns with Haar's distribution: QR of Gaussians, its free signs fixed by R's diagonal."""
    noise = torch.randn(*like.shape, generator=generator).to(like.device)
    q, r = torch.linalg.qr(noise)
    return q * torch.where(r.diagonal() < 0, -1.0, 1.0)


class _Point(NamedTuple):
    alpha: float
    value: float


def bisect_alpha(
    value_of: Callable[[float], float],
    target: float,
    *,
    what: str = "value",
    tolerance: float = 0.002,
    steps: int = 12,
) -> float:
    """The size of a random change at which a value is reached that falls as the change grows.

    Starts at α = 1, doubles or halves until the target lies between two sizes, then alternates between
    interpolation (of the value over log α) and bisection. Noise in the value costs precision only.

    Args:
        value_of: Measures the value at a size, such as an overlap.
        target: The value to reach.
        what: What errors call the value.
        tolerance: Distance from the target that is near enough.
        steps: Measurements after the target was bracketed.

    Returns:
        The size whose measured value was nearest to the target.

    Raises:
        NumericsError: When no size reaches the target, or a value is not finite.
    """
    seen: list[_Point] = []

    def measure(alpha: float) -> _Point:
        seen.append(_Point(alpha, float(value_of(alpha))))
        if not math.isfinite(seen[-1].value):
            raise NumericsError(
                f"The {what} under a random change of {alpha:.3g} times the fine-tune's size is not a number",
                found=seen[-1].value,
            )
        return seen[-1]

    def near(point: _Point) -> bool:
        return abs(point.value - target) <= tolerance

    low, high = _bracket(measure, near, target, what)
    for step in range(steps):
        if near(low) or near(high):
            break
        share = (low.value - target) / (low.value - high.value) if step % 2 == 0 else 0.5
        middle = measure(low.alpha * (high.alpha / low.alpha) ** share)
        low, high = (middle, high) if middle.value > target else (low, middle)
    # The latest of equals, because they close in.
    return min(reversed(seen), key=lambda point: abs(point.value - target)).alpha


def _bracket(
    measure: Callable[[float], _Point], near: Callable[[_Point], bool], target: float, what: str
) -> tuple[_Point, _Point]:
    """Two sizes with a value above the target at the smaller and not above it at the larger."""
    point = start = measure(1.0)
    growing = start.value > target
    for _ in range(DOUBLINGS):
        if near(point):
            return point, point
        former, point = point, measure(point.alpha * (2.0 if growing else 0.5))
        if (point.value > target) != growing:
            return (former, point) if growing else (point, former)
    if near(point):
        return point, point
    raise NumericsError(
        f"No random change of the weights has the {what} of the fine-tune",
        expected=f"{target:.4f}",
        found=f"{start.value:.4f} at the fine-tune's own size and {point.value:.4f} at {point.alpha:.3g} times it",
    )
