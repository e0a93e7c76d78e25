"""Bases that learned nothing, read exactly like the dictionary: what does the dictionary add over them?"""

from collections.abc import Iterable

import torch
from jaxtyping import Float
from torch import Tensor

from palimpsest.dictionaries import Dictionary

SAMPLE_TOKENS = 16384
"""Tokens of general text that the mean and the principal components come from."""


@torch.inference_mode()
def control_dictionaries(
    acts: Iterable[Float[Tensor, "tokens models d_model"]], dictionary: Dictionary, seed: int
) -> dict[str, Dictionary]:
    """Random directions, principal components and neurons of a site, from the base's activations.

    Each is centred on the mean activation and keeps as many of its strongest signed coordinates per token as the
    dictionary has active latents (its k, or its mean L0). `random` has as many latents as the dictionary; the two
    orthonormal bases have `2 d_model` (a direction and its negative).
    """
    sample: list[Tensor] = []
    seen = 0
    for batch in acts:
        sample.append(batch[:, 0].float().cpu())
        seen += len(batch)
        if seen >= SAMPLE_TOKENS:
            break
    rows = torch.cat(sample)[:SAMPLE_TOKENS]
    mean = rows.mean(0)
    d_model = rows.shape[1]
    centred = (rows - mean).double()
    k = dictionary.k or dictionary.encode(rows[:1024].to(dictionary.device)).l0().float().mean().item()
    k = max(1, round(k))
    components = torch.linalg.eigh(centred.T @ centred).eigenvectors.flip(1).T.float()
    k_basis = min(k, d_model)
    return {
        "random": Dictionary.random(d_model, dictionary.n_latents, k, mean=mean, seed=seed),
        "pca": Dictionary.basis(components.contiguous(), k_basis, mean=mean),
        "neurons": Dictionary.basis(torch.eye(d_model), k_basis, mean=mean),
    }
