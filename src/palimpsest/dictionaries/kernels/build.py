"""Compiling the C++ kernels on first use, into the cache that PyTorch keeps for extensions.

One compiler run, no build system. The result appears under its final name in one step, with its checksum beside it,
so a build that was interrupted, or a file that was damaged, is only ever built again.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from palimpsest.log import log

SOURCE = Path(__file__).with_name("sparse.cpp")

FLAGS = ("-std=c++17", "-O3", "-fPIC", "-fno-math-errno", "-fno-trapping-math")

CHOICES = (
    ("-march=native", "-fopenmp"),
    ("-mcpu=native", "-fopenmp"),
    ("-fopenmp",),
    (),
)
"""Further flags, in order of preference; the first that this compiler takes are used."""

LONGEST_BUILD_S = 300


def library() -> ctypes.CDLL | None:
    """The compiled kernels, built now if need be; None, with one line in the log, where that fails."""
    try:
        return _load()
    except (OSError, RuntimeError, ImportError, subprocess.SubprocessError) as error:
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        log.info("C++ kernels are not available (%s); PyTorch's own operators give the same results", reason)
        return None


def _load() -> ctypes.CDLL:
    if os.name != "posix":
        raise RuntimeError("they are built on POSIX systems only")
    folder = _folder()
    target = folder / f"palimpsest_sparse_{_fingerprint()}.so"
    if not _intact(target):
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(folder / "palimpsest_sparse.lock"):
            # Another process may have built it while this one waited.
            if not _intact(target):
                log.info("compiling the C++ kernels into %s (once)", folder)
                _build(target)
    return ctypes.CDLL(str(target))


def _folder() -> Path:
    root = os.environ.get("TORCH_EXTENSIONS_DIR")
    if root:
        return Path(root) / "palimpsest_sparse"
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "torch_extensions" / "palimpsest_sparse"


def _fingerprint() -> str:
    """Of everything that the machine code depends on; a cache may be shared by unequal machines."""
    told = [SOURCE.read_text(), repr((FLAGS, CHOICES)), os.environ.get("CXX", ""), torch.__version__]
    told += [platform.machine(), platform.system(), platform.libc_ver()[1], _cpu()]
    return hashlib.sha256("\n".join(told).encode()).hexdigest()[:16]


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    wanted = ("flags", "Features", "model name", "CPU part")
    return "\n".join(sorted({line for line in lines if line.startswith(wanted)}))


def _intact(target: Path) -> bool:
    try:
        return _checksum(target).read_text() == hashlib.sha256(target.read_bytes()).hexdigest()
    except OSError:
        return False


def _checksum(target: Path) -> Path:
    return target.with_suffix(".sha256")


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a lock that the system releases when its process ends, however it ends."""
    import fcntl

    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _build(target: Path) -> None:
    # Imported here: it needs setuptools and a third of a second, and a build happens once per machine.
    from torch.utils.cpp_extension import get_cxx_compiler

    compiler = shlex.split(get_cxx_compiler())
    for left in target.parent.glob("building_*"):
        shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix="building_") as scratch:
        objects, made = Path(scratch) / "sparse.o", Path(scratch) / "sparse.so"
        compiled: str | None = None
        for choice in CHOICES:
            compiled = _run([*compiler, *FLAGS, *choice, "-c", str(SOURCE), "-o", str(objects)])
            # Linked without OpenMP: its symbols are then PyTorch's, already in the process. A second runtime
            # would keep its own threads spinning.
            shared = (
                ["-shared"] if platform.system() != "Darwin" else ["-shared", "-undefined", "dynamic_lookup"]
            )
            if compiled is None and _run([*compiler, *shared, str(objects), "-o", str(made)]) is None:
                try:
                    ctypes.CDLL(str(made))
                except OSError as error:
                    compiled = str(error)
                    continue
                break
        else:
            raise RuntimeError(compiled or "the linker failed")
        _checksum(target).write_text(hashlib.sha256(made.read_bytes()).hexdigest())
        made.replace(target)


def _run(command: list[str]) -> str | None:
    """Run a compiler; return what it said when it failed."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=LONGEST_BUILD_S)
    return None if done.returncode == 0 else (done.stderr or f"{command[0]} failed")
