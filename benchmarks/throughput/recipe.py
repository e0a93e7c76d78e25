"""The published BatchTopK crosscoder recipe, dense, in plain PyTorch: the stand-in for crosscoder_learning.

That library is a source tree, not a package, so it cannot be installed here. Written from the formulas of the paper
(arXiv 2504.02922) and of the description of its training: one code for both models, selection of the k·B largest
activations weighted by the sum of the decoder norms, unsquared reconstruction norm, AuxK on long-dead latents, Adam,
gradient clipping at 1, b_dec from the geometric median of the first batch, threshold by moving average.

Where the recipe leaves a choice, the faster one is taken: fused Adam, and one matrix product over both models.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

AUXK_ALPHA = 1 / 32
DEAD_TOKENS = 10_000_000
CLIP = 1.0


class DenseCrosscoder(nn.Module):
    """`f = relu(sum_m x_m W_enc_m + b_enc)`, `x_m ≈ f W_dec_m + b_dec_m`; b_dec is not subtracted first."""

    def __init__(self, models: int, d_model: int, latents: int) -> None:
        super().__init__()
        encoder = torch.empty(d_model, latents)
        nn.init.kaiming_uniform_(encoder, a=math.sqrt(5))
        encoder = encoder / encoder.norm(dim=0)
        self.models, self.d_model = models, d_model
        # The same directions in every model, and the decoder as their transpose.
        self.W_enc = nn.Parameter(encoder.repeat(models, 1))
        self.W_dec = nn.Parameter(encoder.T.repeat(1, models).contiguous())
        self.b_enc = nn.Parameter(torch.zeros(latents))
        self.b_dec = nn.Parameter(torch.zeros(models * d_model))
        self.register_buffer("threshold", torch.tensor(-1.0))

    def weights(self) -> Tensor:
        """Sum over models of the decoder norms, `[latents]`: the factor of the selection score."""
        return self.W_dec.view(-1, self.models, self.d_model).norm(dim=2).sum(dim=1)

    def activations(self, flat: Tensor) -> Tensor:
        return torch.relu(flat @ self.W_enc + self.b_enc)

    def decode(self, codes: Tensor) -> Tensor:
        return codes @ self.W_dec + self.b_dec

    @torch.no_grad()
    def encode(self, flat: Tensor) -> Tensor:
        """At inference: activations whose score is above the threshold."""
        f = self.activations(flat)
        return f * (f * self.weights() > self.threshold)


def geometric_median(x: Tensor, iterations: int = 100) -> Tensor:
    guess = x.mean(dim=0)
    for _ in range(iterations):
        weight = 1 / (x - guess).norm(dim=1).clamp(min=1e-8)
        last, guess = guess, (weight[:, None] * x).sum(dim=0) / weight.sum()
        if (guess - last).norm() < 1e-5:
            break
    return guess


class DenseTrainer:
    """One step at a time; `lr_at` gives the learning rate of a step."""

    def __init__(self, model: DenseCrosscoder, k: int, lr_at, threshold_start: int = 1000) -> None:
        self.model, self.k, self.lr_at, self.threshold_start = model, k, lr_at, threshold_start
        self.optimiser = torch.optim.Adam(model.parameters(), lr=1e-4, fused=True)
        self.idle = torch.zeros(model.W_dec.shape[0], dtype=torch.long, device=model.W_dec.device)
        self.step = 0

    def advance(self, x: Tensor, autocast) -> None:
        """Train on `[tokens, models, d_model]`."""
        model, flat = self.model, x.flatten(1)
        if self.step == 0:
            centre = [geometric_median(x[:, m]) for m in range(model.models)]
            model.b_dec.data.copy_(torch.cat(centre))
        with autocast():
            f = model.activations(flat)
            score = f * model.weights()
            kept = score.flatten().topk(self.k * x.shape[0], sorted=False)
            codes = torch.zeros_like(f).flatten()
            codes = codes.scatter(0, kept.indices, f.flatten()[kept.indices]).view_as(f)
            error = flat - model.decode(codes)
            loss = error.float().view(-1, model.models, model.d_model).norm(dim=2).mean()
            loss = loss + AUXK_ALPHA * self.auxiliary(error.detach().float(), score, f)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        for group in self.optimiser.param_groups:
            group["lr"] = self.lr_at(self.step)
        self.optimiser.step()
        self.optimiser.zero_grad()
        self.account(codes.detach(), kept.values.detach().float(), x.shape[0])

    def auxiliary(self, residual: Tensor, score: Tensor, f: Tensor) -> Tensor | float:
        dead = self.idle >= DEAD_TOKENS
        count = int(dead.sum())
        if count == 0:
            return 0.0
        width = min(self.model.d_model // 2, count)
        place = torch.where(dead, score, -torch.inf).topk(width, dim=1, sorted=False).indices
        codes = torch.zeros_like(f).scatter(1, place, f.gather(1, place))
        missed = (residual - codes @ self.model.W_dec).square().sum(dim=1).mean()
        spread = (residual - residual.mean(dim=0)).square().sum(dim=1).mean()
        return (missed / spread).nan_to_num(0.0)

    @torch.no_grad()
    def account(self, codes: Tensor, scores: Tensor, tokens: int) -> None:
        fired = codes.sum(dim=0) > 0
        self.idle = torch.where(fired, 0, self.idle + tokens)
        self.step += 1
        if self.step > self.threshold_start and (scores > 0).any():
            smallest = scores[scores > 0].min()
            old = self.model.threshold
            self.model.threshold = smallest if old < 0 else 0.999 * old + 0.001 * smallest
