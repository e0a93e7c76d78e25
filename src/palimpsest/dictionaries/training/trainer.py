"""The state of a training run: weights, optimiser, dead-latent accounts, threshold."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from palimpsest.dictionaries import kernels
from palimpsest.dictionaries.config import FIXED, TrainConfig
from palimpsest.dictionaries.dictionary import Dictionary
from palimpsest.dictionaries.fold import fold
from palimpsest.dictionaries.native import build
from palimpsest.dictionaries.training.step import Forward, Plan, forward
from palimpsest.dictionaries.training.weights import Weights
from palimpsest.errors import NumericsError

DEAD_REFRESH = 10
"""Steps between two looks at which latents are dead; looking costs a device synchronisation."""

THRESHOLD_SHARE = 0.1
"""The inference threshold averages over about this share of the steps so far, at most `THRESHOLD_STEPS`."""

THRESHOLD_STEPS = 1000

CUT_MARGIN = 0.9
"""How far below the running threshold the search for a batch's largest scores starts; too high costs a second look."""

NAN_FIX = "Run the model in float32 or bfloat16 instead of float16, and check its weights"


class Trainer:
    """A run between two steps. Weights live in scaled units; `finished` folds the scale back."""

    def __init__(self, config: TrainConfig, weights: Weights, scale: Float[Tensor, " models"]) -> None:
        """Start from initialised weights.

        Args:
            config: The recipe.
            weights: For activations that were multiplied by `scale`; trained in place.
            scale: One factor per model.
        """
        self.config, self.weights, self.scale = config, weights, scale
        self.optimiser = torch.optim.Adam(weights.named().values(), lr=config.peak_lr, fused=True)
        self.precision = precision(config)
        device = scale.device
        self.idle = torch.zeros(config.n_latents, dtype=torch.long, device=device)
        self.dead = torch.zeros(0, dtype=torch.long, device=device)
        self.threshold = torch.zeros((), device=device)
        self.bad_step = torch.full((), -1, dtype=torch.long, device=device)
        self.bad_batch: Tensor | None = None
        self.density, self.full = 1.0, True
        self.step = self.tokens = 0

    @classmethod
    @torch.inference_mode(False)
    def start(cls, config: TrainConfig, first: Float[Tensor, "tokens models d_model"]) -> Trainer:
        """Initialise from the first batch: scales, decoder bias, random directions.

        Raises:
            NumericsError: The batch holds NaN or infinity, or nothing but zeros.
        """
        first = first.float()
        if not torch.isfinite(first).all():
            raise NumericsError("The activations of step 0 hold NaN or infinity", fix=NAN_FIX)
        _, models, d_model = first.shape
        norm = first.norm(dim=2).mean(dim=0)
        if not (norm > 0).all():
            raise NumericsError("The activations of the first batch are all zero", fix="Check the site")
        scale = math.sqrt(d_model) / norm
        weights = Weights.blank(config, models, d_model)
        with torch.no_grad():
            centre = [geometric_median(first[:, model] * scale[model]) for model in range(models)]
            weights.b_dec.copy_(torch.cat(centre))
        return cls(config, weights, scale)

    def advance(self, x: Float[Tensor, "tokens models d_model"]) -> Forward:
        """Take one step; waits for the device every `DEAD_REFRESH` steps only.

        Raises:
            NumericsError: On the CPU, the batch or the loss holds NaN or infinity. Elsewhere `check` tells.
        """
        if self.step % DEAD_REFRESH == 0:
            self.dead = (self.idle >= self.config.dead_after).nonzero().squeeze(1)
        # A stream that is a generator under no_grad would otherwise bring that mode here.
        with torch.inference_mode(False), torch.enable_grad():
            made = forward(self.weights, x.float() * self.scale[:, None], self.config, self._plan())
            total = made.losses.total()
            self._watch(x, total.detach())
            self.optimiser.zero_grad(set_to_none=True)
            total.backward()
        self.weights.constrain_gradients(self.config)
        for group in self.optimiser.param_groups:
            group["lr"] = self.config.lr_at(self.step)
        torch.nn.utils.clip_grad_norm_(self.weights.named().values(), self.config.clip)
        self.optimiser.step()
        self.weights.constrain(self.config)
        self._account(made)
        return made

    def _plan(self) -> Plan:
        on_cpu = self.scale.device.type == "cpu"
        # Reading the threshold is free on a CPU and would wait for any other device.
        # A batch that had fewer positive scores than wanted has no cut to start from.
        cut = (
            CUT_MARGIN * float(self.threshold) if on_cpu and self.full and float(self.threshold) > 0 else None
        )
        return Plan(self.step, self.dead, cut, self.density, self.precision)

    @torch.no_grad()
    def _account(self, made: Forward) -> None:
        tokens = len(made.target)
        self.idle = torch.where(made.active > 0, 0, self.idle + tokens)
        self.step += 1
        self.tokens += tokens
        if self.config.activation not in FIXED and self.step % DEAD_REFRESH == 0:
            self.density = float(made.active.sum()) / (tokens * self.config.n_latents)
        if self.config.activation == "batch_topk" and tokens and self.scale.device.type == "cpu":
            self.full = int(made.active.sum()) >= int(self.config.k_at(self.step - 1) * tokens)
        # The window grows with the run, so the average is unbiased from the first step and soon forgets it. It
        # begins when k has come down: before, the cut was another one.
        since = self.step - self.config.k_anneal * self.config.steps
        window = min(max(1.0, THRESHOLD_SHARE * since), THRESHOLD_STEPS)
        moved = self.threshold + (made.smallest - self.threshold) / window
        self.threshold = torch.where(torch.isfinite(made.smallest), moved, self.threshold)

    @torch.no_grad()
    def _watch(self, x: Tensor, total: Tensor) -> None:
        """Remember the first step with NaN and its batch, on the device; a CPU looks at once."""
        if x.device.type == "cpu":
            if math.isfinite(float(total)):
                return
            self.bad_step.fill_(self.step)
            self.bad_batch = x.clone()
            self.check()
        fresh = ~torch.isfinite(total) & (self.bad_step < 0)
        self.bad_step = torch.where(fresh, self.step, self.bad_step)
        kept = torch.zeros_like(x) if self.bad_batch is None else self.bad_batch
        self.bad_batch = torch.where(fresh, x, kept)

    def check(self) -> None:
        """Raise if any step so far met NaN; waits for the device.

        Raises:
            NumericsError: Names the step, and says whether the batch (kept in `bad_batch`) held it already.
        """
        step = int(self.bad_step)
        if step < 0:
            return
        assert self.bad_batch is not None
        if not torch.isfinite(self.bad_batch).all():
            rows = (~torch.isfinite(self.bad_batch)).flatten(1).any(dim=1).nonzero().squeeze(1)
            raise NumericsError(
                f"The activations of step {step} hold NaN or infinity",
                found=f"{len(rows)} of {len(self.bad_batch)} tokens, the first is row {int(rows[0])}",
                fix=NAN_FIX,
            )
        raise NumericsError(f"The loss became NaN or infinite at step {step}", fix="Lower the learning rate")

    def dead_share(self) -> float:
        """Share of latents that have been idle for too long."""
        return float((self.idle >= self.config.dead_after).float().mean())

    @torch.no_grad()
    def figures(self, made: Forward) -> dict[str, float]:
        """Figures of a step for a log; waits for the device.

        `fve` is over all models, `fve_base` and `fve_tuned` of each model of a pair.
        """
        terms = {name: float(term.detach()) for name, term in made.losses.terms.items()}
        error = (made.target - made.output).square().sum(dim=(0, 2))
        spread = (made.target - made.target.mean(dim=0)).square().sum(dim=(0, 2)).clamp(min=1e-12)
        per_model = (1 - error / spread).tolist()
        figures = {
            "lr": self.config.lr_at(self.step - 1),
            "loss": float(made.losses.total().detach()),
            **terms,
            "fve": 1 - float(error.sum() / spread.sum()),
        }
        if len(per_model) == 2:
            figures |= {"fve_base": per_model[0], "fve_tuned": per_model[1]}
        l0 = float(made.active.sum()) / len(made.target)
        return figures | {"l0": l0, "dead_share": self.dead_share()}

    @torch.no_grad()
    def finished(self, metadata: Mapping[str, Any]) -> Dictionary:
        """The dictionary for raw activations: scales, decoder norms and threshold folded into the weights.

        Raises:
            NumericsError: A weight is not finite.
        """
        fields, weights = self.weights.fields_and_weights(self.config)
        for name, tensor in weights.items():
            if not torch.isfinite(tensor).all():
                raise NumericsError(
                    f"{name} became NaN or infinite by step {self.step}", fix="Lower the learning rate"
                )
        if self.config.activation == "batch_topk":
            weights["threshold"] = self.threshold
        weights = fold(fields, weights, scale=self.scale)
        return build(fields, weights, "the trained dictionary", metadata=dict(metadata))


def precision(config: TrainConfig) -> str:
    """The encode product's type: the recipe's, or bfloat16 where that is faster as a whole.

    On a CPU that takes instructions for it, and the native kernels: the others lose more in the selection than the
    product gains.
    """
    if config.dtype != "auto":
        return config.dtype
    if torch.device(config.device).type == "cuda":
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    fast = kernels.backend(config.device) == "native" and torch.cpu._is_avx512_bf16_supported()
    return "bfloat16" if fast else "float32"


@torch.no_grad()
def geometric_median(points: Float[Tensor, "tokens d_model"], rounds: int = 64) -> Float[Tensor, " d_model"]:
    """The point of least summed distance to all points, by Weiszfeld's iteration; outliers hardly move it."""
    centre = points.mean(dim=0)
    for _ in range(rounds):
        weight = 1 / (points - centre).norm(dim=1).clamp(min=1e-6)
        centre = (weight @ points) / weight.sum()
    return centre
