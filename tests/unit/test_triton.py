"""The Triton kernels against the PyTorch path: interpreted on CPU, compiled for a GPU, and run where there is one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib import util

import pytest
import torch

import triton_checks
from helpers import REPOSITORY

if util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)


def in_its_own_process(what, folder):
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(str(REPOSITORY / part) for part in ("src", "tests")),
        "TRITON_CACHE_DIR": str(folder),
        "OMP_NUM_THREADS": "1",
        "PALIMPSEST_KERNELS": "auto",
    }
    # Only the interpreter's own process may interpret.
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, triton_checks.__file__, what]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory):
    return in_its_own_process("interpret", tmp_path_factory.mktemp("triton"))


@pytest.mark.parametrize("name", triton_checks.CHECKS)
def test_interpreted(interpreted, name):
    assert interpreted[name] is None, interpreted[name]


@pytest.mark.slow
def test_every_kernel_compiles_for_an_h100(tmp_path):
    failures = {name: text for name, text in in_its_own_process("compile", tmp_path).items() if text}
    assert not failures, "\n".join(failures.values())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("world", [triton_checks.INTERPRETED, triton_checks.REAL], ids=["small", "real"])
@pytest.mark.parametrize("name", triton_checks.CHECKS)
def test_on_a_gpu(name, world):
    triton_checks.run(name, world, "cuda")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_training_steps_kernels_never_wait_for_the_gpu():
    from palimpsest.dictionaries import kernels

    x, weight, bias = triton_checks.weights(triton_checks.REAL, "cuda")
    with kernels.use("triton"):
        for watched in ("default", "error"):
            # The first round compiles and fills the allocator, which may wait.
            torch.cuda.set_sync_debug_mode(watched)
            try:
                value, index = kernels.encode_topk(x, weight, bias, 8, precision="bfloat16")
                crow = torch.arange(x.shape[0] + 1, device="cuda") * 8
                grouped = kernels.by_latent(crow, index.view(-1), weight.shape[0])
                kernels.row_sum(crow, index.view(-1), value.view(-1), weight)
                kernels.row_sum(grouped.crow, grouped.token, value.view(-1)[grouped.place], x)
                kernels.row_dot(crow, index.view(-1), x, weight)
                kernels.encode_batch_topk(x, weight, bias, 8 * x.shape[0], precision="bfloat16")
            finally:
                torch.cuda.set_sync_debug_mode("default")
