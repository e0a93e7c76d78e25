"""Objectives of held-out rows, from log-probabilities in float64; what trl minimises, written from the papers.

Imports no torch: these are for measuring, not for training.
"""

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray

Numbers = Float[NDArray, " rows"]

BETA = {"dpo": 0.1, "kto": 0.1, "orpo": 0.1, "simpo": 10.0, "unlearn": 0.1, "grpo": 0.0, "sft": 0.0}
"""Strength of the reference, of orpo's odds ratio, of simpo's reward, where none is given."""

SIMPO_MARGIN = 0.5
"""By how much simpo wants the chosen answer's reward to be above the other's."""


def softplus(x: Numbers) -> Numbers:
    """log(1 + e^x), without overflow."""
    return np.logaddexp(0.0, x)


def dpo(margin: Numbers, beta: float) -> Numbers:
    """-log sigmoid(beta margin); log 2 where nothing was learned (Rafailov et al. 2023, equation 7).

    Args:
        margin: log p/p_ref of the chosen answer minus the same of the rejected one, nats.
        beta: Strength of the reference.
    """
    return softplus(-beta * margin)


def simpo(chosen: Numbers, rejected: Numbers, beta: float) -> Numbers:
    """-log sigmoid(beta (chosen - rejected) - margin) (Meng et al. 2024, equation 6).

    Args:
        chosen: Mean log-probability of a token of the chosen answer.
        rejected: Of the rejected one.
        beta: Scale of the reward.
    """
    return softplus(-(beta * (chosen - rejected) - SIMPO_MARGIN))


def odds_ratio(chosen: Numbers, rejected: Numbers, beta: float) -> Numbers:
    """The second term of orpo: -beta log sigmoid(log odds of chosen - log odds of rejected).

    Source: Hong et al. 2024, equations 4 and 7. The first term is the loss of the chosen row.

    Args:
        chosen: Mean log-probability of a token of the chosen answer, below 0.
        rejected: Of the rejected one.
        beta: Weight.
    """
    with np.errstate(divide="ignore"):
        odds = (chosen - rejected) - (np.log(-np.expm1(chosen)) - np.log(-np.expm1(rejected)))
    return beta * softplus(-odds)


def kto(ratio: Numbers, wanted: NDArray, mismatched: Numbers, beta: float) -> Numbers:
    """1 - sigmoid(beta (ratio - z)) of wanted answers, 1 - sigmoid(beta (z - ratio)) of the others.

    Source: Ethayarajh et al. 2024, equation 8, both weights 1. z, the estimate of the divergence from the reference, is
    the mean of `mismatched`, at least 0; it is one number for all rows.

    Args:
        ratio: log p/p_ref of each answer.
        wanted: Whether it is wanted.
        mismatched: The same ratio of each prompt with another row's answer.
        beta: Strength of the reference.
    """
    z = max(0.0, float(mismatched.mean())) if len(mismatched) else 0.0
    signed = np.where(wanted, ratio - z, z - ratio)
    return np.exp(-softplus(beta * signed))


def npo(ratio: Numbers, beta: float) -> Numbers:
    """2 / beta log(1 + (p / p_ref)^beta): falls to 0 as a text is forgotten (Zhang et al. 2024, equation 3).

    Args:
        ratio: log p/p_ref of a whole text.
        beta: Strength of the reference.
    """
    return 2.0 / beta * softplus(beta * ratio)
