"""What a latent adapter can be, as names and numbers. Imports no torch."""

from typing import NamedTuple


class About(NamedTuple):
    """One kind of component.

    Attributes:
        formula: f(z) in words of the documentation.
        lr: Learning rate that fits it; a step of Adam moves a value by about this much.
        constant: It adds the same vector to every token, whatever fires.
        reads: It needs the codes of a dictionary.
    """

    formula: str
    lr: float
    constant: bool = False
    reads: bool = True


COMPONENTS = {
    "scale": About("(1 + g(s)) * z", 3e-2),
    "active-bias": About("z + b where z > 0", 3e-2),
    "bias": About("z + b, one constant vector", 3e-2, constant=True, reads=False),
    "relu-bias": About("ReLU(z + b)", 3e-2),
    "lerp": About("z + (2 sigmoid(t) - 1)(v - z)", 3e-2),
    "gate": About("ReLU(z + S(G x + c)) where z > 0, S a soft threshold", 1e-3),
    "low-rank": About("z + B A z", 1e-3),
    "mlp": About("z + B act(A z + a)", 1e-3),
    "vector": About("x + v, one dense vector and no latents", 3e-2, constant=True, reads=False),
}
"""Every component with what it does to the codes z of a token x, and the learning rate that fits it."""

SIGNED = ("scale", "active-bias", "bias", "relu-bias")
"""Components whose number per latent says in which direction it moves; of the others it is a length."""

TRANSFORMS = ("identity", "exp", "non-negative", "one-sided")
"""g of the scale component: s; e^s - 1; s above 0 and e^s - 1 below; max(s, 0)."""

NONLINEARITIES = ("gelu", "relu", "silu")
"""Of the mlp component."""

SCOPES = ("all", "prompt", "answer", "first", "last")
"""Which tokens are edited."""

OBJECTIVES = ("sft", "dpo", "kto", "orpo", "simpo", "grpo", "unlearn")
"""What is minimised; all but sft and unlearn come from trl."""

PREFERENCES = ("dpo", "orpo", "simpo")
"""Objectives that read pairs of a chosen and a rejected answer."""

METHODS = (*COMPONENTS, "lora", "diffmean", "best-latent", "latents")
"""What a table of baselines can hold: the components, LoRA, the difference of two means as a vector, a constant on the
one latent that tells the data from general text best, and a constant on latents chosen by hand."""

MOVED = 1e-3
"""A latent whose value is no further from 0 counts as not moved."""
