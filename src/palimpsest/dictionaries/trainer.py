"""The state of a training run: weights, optimiser, dead-latent accounts, threshold; and how it is saved."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors.torch import save_file
from torch import Tensor

from palimpsest.dictionaries.config import TrainConfig
from palimpsest.dictionaries.dictionary import Dictionary
from palimpsest.dictionaries.native import build
from palimpsest.dictionaries.step import Forward, forward
from palimpsest.errors import ArtifactError, NumericsError

DEAD_REFRESH = 10
"""Steps between two looks at which latents are dead; looking costs a device synchronisation."""

THRESHOLD_SHARE = 0.1
"""The inference threshold averages over about this share of the steps so far, at most `THRESHOLD_STEPS`."""

THRESHOLD_STEPS = 1000


class Trainer:
    """A run between two steps. Weights live in scaled units; `finished` folds the scale back."""

    def __init__(self, config: TrainConfig, dictionary: Dictionary, scale: Float[Tensor, " models"]) -> None:
        """Start from an initialised dictionary.

        Args:
            config: The recipe.
            dictionary: Weights for activations that were multiplied by `scale`; trained in place.
            scale: One factor per model.
        """
        self.config, self.dictionary, self.scale = config, dictionary.train().requires_grad_(True), scale
        self.optimiser = torch.optim.Adam(dictionary.parameters(), lr=config.peak_lr, fused=True)
        device = dictionary.device
        self.idle = torch.zeros(config.n_latents, dtype=torch.long, device=device)
        self.dead = torch.zeros(0, dtype=torch.long, device=device)
        self.threshold = torch.zeros((), device=device)
        self.bad_input = torch.full((), -1, dtype=torch.long, device=device)
        self.bad_loss = self.bad_input.clone()
        self.step = self.tokens = 0

    @classmethod
    def start(cls, config: TrainConfig, first: Float[Tensor, "tokens models d_model"]) -> Trainer:
        """Initialise from the first batch: scales, decoder bias, random directions.

        Raises:
            NumericsError: The batch holds NaN or infinity, or nothing but zeros.
        """
        first = first.float()
        if not torch.isfinite(first).all():
            raise NumericsError("The activations of step 0 hold NaN or infinity", fix=_NAN_FIX)
        _, models, d_model = first.shape
        norm = first.norm(dim=2).mean(dim=0)
        if not (norm > 0).all():
            raise NumericsError("The activations of the first batch are all zero", fix="Check the site")
        scale = math.sqrt(d_model) / norm
        dictionary = cls.blank(config, models, d_model)
        with torch.no_grad():
            centre = [geometric_median(first[:, model] * scale[model]) for model in range(models)]
            dictionary.b_dec.copy_(torch.stack(centre))
        return cls(config, dictionary, scale)

    @staticmethod
    def blank(config: TrainConfig, models: int, d_model: int) -> Dictionary:
        """Seeded random unit decoder rows and their transpose; the caller's generator is not touched."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            dictionary = Dictionary(
                d_model,
                config.n_latents,
                activation=config.activation,
                k=None if config.activation == "relu" else config.k,
                models=models,
                view="pair" if models > 1 else config.view,
            )
        return dictionary.to(config.device)

    def advance(self, x: Float[Tensor, "tokens models d_model"]) -> Forward:
        """Take one step; never waits for the device."""
        flat = self.dictionary.flatten_input(x.float() * self.scale[:, None])
        if self.step % DEAD_REFRESH == 0:
            self.dead = (self.idle >= self.config.dead_after).nonzero().squeeze(1)
        made = forward(self.dictionary, flat, self.config, self.config.k_at(self.step), self.dead)
        total = made.losses.total()
        self._watch(flat, total)
        self.optimiser.zero_grad(set_to_none=True)
        total.backward()
        for group in self.optimiser.param_groups:
            group["lr"] = self.config.lr_at(self.step)
        self._project()
        torch.nn.utils.clip_grad_norm_(self.dictionary.parameters(), self.config.clip)
        self.optimiser.step()
        self._account(made, x.shape[0])
        return made

    @torch.no_grad()
    def _project(self) -> None:
        """Remove the part of the decoder's gradient that would only change the length of its rows."""
        rows, grad = self.dictionary.W_dec.flatten(1), self.dictionary.W_dec.grad
        assert grad is not None
        grad = grad.view_as(rows)
        grad -= (grad * rows).sum(dim=1, keepdim=True) * rows

    @torch.no_grad()
    def _account(self, made: Forward, tokens: int) -> None:
        rows = self.dictionary.W_dec.flatten(1)
        self.dictionary.W_dec.copy_((rows / rows.norm(dim=1, keepdim=True)).view_as(self.dictionary.W_dec))
        self.idle = torch.where(made.active > 0, 0, self.idle + tokens)
        self.step += 1
        self.tokens += tokens
        # The window grows with the run, so the average is unbiased from the first step and soon forgets it.
        window = min(max(1.0, THRESHOLD_SHARE * self.step), THRESHOLD_STEPS)
        moved = self.threshold + (made.smallest - self.threshold) / window
        self.threshold = torch.where(torch.isfinite(made.smallest), moved, self.threshold)

    @torch.no_grad()
    def _watch(self, flat: Tensor, total: Tensor) -> None:
        """Remember the first step with NaN, on the device."""
        for name, healthy in (("bad_input", torch.isfinite(flat).all()), ("bad_loss", torch.isfinite(total))):
            first = getattr(self, name)
            setattr(self, name, torch.where(healthy | (first >= 0), first, self.step))

    def check(self) -> None:
        """Raise if any step so far met NaN; waits for the device.

        Raises:
            NumericsError: Names the step.
        """
        if (step := int(self.bad_input)) >= 0:
            raise NumericsError(f"The activations of step {step} hold NaN or infinity", fix=_NAN_FIX)
        if (step := int(self.bad_loss)) >= 0:
            raise NumericsError(
                f"The loss became NaN or infinite at step {step}", fix="Lower the learning rate"
            )

    def dead_share(self) -> float:
        """Share of latents that have been idle for too long."""
        return float((self.idle >= self.config.dead_after).float().mean())

    @torch.no_grad()
    def finished(self, metadata: dict[str, Any]) -> Dictionary:
        """The dictionary for raw activations: scales and threshold folded into the weights.

        One common factor keeps decoder rows at unit norm (exactly so for one model) and the order of latents.
        """
        trained, scale = self.dictionary, self.scale
        common = scale.log().mean().exp()
        weights = {
            "W_enc": trained.W_enc * (scale / common)[:, None, None],
            "W_dec": trained.W_dec * (common / scale)[None, :, None],
            "b_enc": trained.b_enc / common,
            "b_dec": trained.b_dec / scale[:, None],
        }
        if trained.activation == "batch_topk":
            weights["threshold"] = (self.threshold / common).expand(trained.n_latents).clone()
        weights = {name: tensor.detach() for name, tensor in weights.items()}
        fields = {
            name: value for name, value in trained.describe().items() if name not in ("dtype", "metadata")
        }
        return build(fields, weights, "the trained dictionary", metadata=metadata)

    def save(self, path: Path) -> None:
        """Write everything that the next step depends on into one safetensors file."""
        tensors = {f"weight.{name}": p.detach() for name, p in self.dictionary.named_parameters()}
        for name, parameter in self.dictionary.named_parameters():
            for moment, value in self.optimiser.state[parameter].items():
                tensors[f"adam.{moment}.{name}"] = value
        tensors |= {"idle": self.idle, "dead": self.dead, "threshold": self.threshold, "scale": self.scale}
        state = {"step": self.step, "tokens": self.tokens}
        contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
        save_file(contiguous, path, metadata={"state": json.dumps(state)})

    @classmethod
    def load(cls, config: TrainConfig, path: Path) -> Trainer:
        """Continue from what `save` wrote.

        Raises:
            ArtifactError: The file is damaged or belongs to another recipe.
        """
        tensors, state = read_checkpoint(path, config.device)
        try:
            _, models, d_model = tensors["weight.W_dec"].shape
            made = cls(config, cls.blank(config, models, d_model), tensors["scale"])
            with torch.no_grad():
                for name, parameter in made.dictionary.named_parameters():
                    parameter.copy_(tensors[f"weight.{name}"])
                    made.optimiser.state[parameter] = {
                        moment: tensors[f"adam.{moment}.{name}"]
                        for moment in ("step", "exp_avg", "exp_avg_sq")
                    }
            made.idle, made.dead, made.threshold = tensors["idle"], tensors["dead"], tensors["threshold"]
            made.step, made.tokens = int(state["step"]), int(state["tokens"])
        except (KeyError, ValueError, RuntimeError) as error:
            raise ArtifactError(f"{path} does not hold a checkpoint of this recipe", found=error) from error
        return made


_NAN_FIX = "Run the model in float32 or bfloat16 instead of float16, and check its weights"


def read_checkpoint(path: Path, device: str = "cpu") -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and counters of a checkpoint.

    Raises:
        ArtifactError: The file cannot be read.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt", device=device) as handle:
            state = json.loads((handle.metadata() or {}).get("state", "{}"))
            return {name: handle.get_tensor(name) for name in handle.keys()}, state  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise ArtifactError(
            f"{path} is no readable checkpoint", found=error, fix="Start again with --overwrite"
        ) from error


@torch.no_grad()
def geometric_median(points: Float[Tensor, "tokens d_model"], rounds: int = 64) -> Float[Tensor, " d_model"]:
    """The point of least summed distance to all points, by Weiszfeld's iteration; outliers hardly move it."""
    centre = points.mean(dim=0)
    for _ in range(rounds):
        weight = 1 / (points - centre).norm(dim=1).clamp(min=1e-6)
        centre = (weight @ points) / weight.sum()
    return centre
