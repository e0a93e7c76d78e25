"""One shard: a safetensors file whose rows are read in any range, straight into memory."""

import json
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from palimpsest.errors import ArtifactError

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
"""Types that a store can hold, by the name in `store.json`."""

LABELS = ("token_ids", "document", "position")
"""What a shard says of each row, int32."""

_FORMATS = {"BF16": torch.bfloat16, "F32": torch.float32, "I32": torch.int32}


class ShardFile:
    """A shard, opened. A context manager.

    Rows are read with plain reads, not through a memory map: a file that is cut short or a disk that is gone gives an
    error instead of ending the process, and the pages of a long store do not count as this process's memory.

    Args:
        path: The file.

    Raises:
        ArtifactError: It cannot be read, or is no safetensors file of the types that a store holds.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._handle = path.open("rb", buffering=0)
        except OSError as error:
            raise damaged(path, str(error)) from error
        try:
            length = int.from_bytes(self._handle.read(8), "little")
            if length > path.stat().st_size:
                raise ValueError("the header is longer than the file")
            header = json.loads(self._handle.read(length))
            header.pop("__metadata__", None)
            self._tensors = {
                name: (_FORMATS[entry["dtype"]], tuple(entry["shape"]), 8 + length + entry["data_offsets"][0])
                for name, entry in header.items()
            }
        except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            self.close()
            raise damaged(path, f"{type(error).__name__}: {error}") from error

    def __enter__(self) -> "ShardFile":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the file."""
        self._handle.close()

    def count(self, name: str) -> int:
        """Rows of a tensor."""
        return self._entry(name)[1][0]

    def rows(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows `start` to `stop` of a tensor, in memory of their own.

        Raises:
            ArtifactError: The file ends before them or cannot be read, or holds no such tensor.
        """
        dtype, shape, _ = self._entry(name)
        stop = shape[0] if stop is None else stop
        rows = torch.empty(stop - start, *shape[1:], dtype=dtype)
        self.read_into(rows, name, start)
        return rows

    def read_into(self, rows: Tensor, name: str, start: int = 0) -> None:
        """Fill contiguous `rows` with those of a tensor from `start` on.

        Raises:
            ArtifactError: The file ends before them or cannot be read, or holds another type or shape.
        """
        dtype, shape, offset = self._entry(name)
        if rows.dtype != dtype or tuple(rows.shape[1:]) != shape[1:] or start + len(rows) > shape[0]:
            raise damaged(self.path, f"{name} is {dtype} of shape {shape}")
        if rows.numel() == 0:
            return
        left = rows.view(-1).view(torch.uint8).numpy().data
        try:
            self._handle.seek(offset + start * (rows.nbytes // len(rows)))
            while left:
                if not (count := self._handle.readinto(left)):
                    raise damaged(self.path, f"it ends inside {name}")
                left = left[count:]
        except OSError as error:
            raise damaged(self.path, str(error)) from error

    def _entry(self, name: str) -> tuple[torch.dtype, tuple[int, ...], int]:
        if name not in self._tensors:
            raise damaged(self.path, f"no tensor {name}")
        return self._tensors[name]


def damaged(path: Path, found: str) -> ArtifactError:
    """The error that names a file of a store that is not as it was written."""
    fix = "Restore the file, or delete the store and harvest it again"
    return ArtifactError(f"{path} is damaged", expected="the file as it was written", found=found, fix=fix)
