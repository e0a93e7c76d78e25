"""Plain functions that several tests share."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
PACKAGE = REPOSITORY / "src" / "palimpsest"


def python_source(code: str, *args: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run Python source in a fresh interpreter that sees the working tree's package."""
    paths = [str(REPOSITORY / "src"), os.environ.get("PYTHONPATH", "")]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in paths if path)} | environment
    command = [sys.executable, "-c", code, *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, env=env, timeout=120, check=False)


def assert_close(found, expected, *, rtol: float = 1e-5, atol: float = 1e-6) -> None:
    """Compare two tensors, arrays or numbers tightly, shapes and types of number included."""
    import torch

    torch.testing.assert_close(torch.as_tensor(found), torch.as_tensor(expected), rtol=rtol, atol=atol)


def assert_not_close(found, expected, *, atol: float = 1e-3) -> None:
    """Fail when two tensors agree everywhere: for tests that something must change."""
    import torch

    distance = (torch.as_tensor(found) - torch.as_tensor(expected)).abs().max().item()
    assert distance > atol, f"expected a difference above {atol}, the largest is {distance}"


def randomize(module, *, seed: int = 0, scale: float = 0.2) -> None:
    """Draw every parameter anew, so that no test passes because of a symmetric initialisation."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(module.named_parameters()):
            noise = torch.randn(parameter.shape, generator=generator) * scale
            parameter.copy_(1 + noise if "norm" in name and parameter.ndim == 1 else noise)
