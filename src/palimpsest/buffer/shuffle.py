"""Mixing a stream of activations in memory: each step moves one batch out and one in, whatever the capacity."""

from collections.abc import Callable, Iterator

import torch
from jaxtyping import Float
from torch import Tensor

from palimpsest.errors import ConfigError

_COUNTS: tuple[str, ...] = ("cursor", "stale", "rows_read", "ended", "batch_size")
_STATE = {"rows", "order", "counts", "generator"}


def buffer_capacity(
    batch_size: int,
    models: int,
    d_model: int,
    dtype: torch.dtype = torch.float32,
    *,
    batches: int = 64,
    limit: int = 2**30,
) -> int:
    """Rows of a buffer that mixes well and fits: `batches` batches, or as many whole ones as `limit` bytes hold.

    Args:
        batch_size: Rows of a batch.
        models: Size of the models axis.
        d_model: Width of the activations.
        dtype: Type that the buffer stores.
        batches: Batches wanted.
        limit: Bytes allowed; two batches are held even where they need more.
    """
    row = models * d_model * dtype.itemsize
    return batch_size * max(2, min(batches, limit // (row * batch_size)))


class ShuffleBuffer:
    """Batches of well-mixed rows from a stream whose neighbours are alike.

    Rows stand in one preallocated tensor. A batch is taken from the next slots of a random permutation of the
    slots, and the rows that come next overwrite exactly these slots: a step moves one batch out and one in,
    whatever the capacity, and no other row moves. Each stretch of `capacity` rows of the stream is so served
    in random order. When the source ends, what is left is served in random order too: a pass over the source
    serves every row exactly once.

    The order depends on the seed, the capacity and the batch size alone, not on how the source cuts its chunks
    nor on the device. An iterator: `state_dict` is exact between any two batches, also after an error or a
    Ctrl-C while the source was read.

    Args:
        source: `source(position)` starts the stream after its first `position` rows; chunks of any length.
        capacity: Rows held; rounded down to whole batches.
        batch_size: Rows of a batch.
        seed: Of the permutations.
        device: Where rows are held and batches come out; nothing waits for the device.
        dtype: Type of the held rows and of the batches; `torch.bfloat16` halves the memory.
        drop_last: Leave out a last batch that is short.

    Raises:
        ConfigError: The capacity is smaller than a batch; while iterating, when the source gives nothing, or
            rows of another shape than before.

    Example:
        >>> rows = torch.arange(6.0).reshape(6, 1, 1)
        >>> buffer = ShuffleBuffer(lambda position: iter([rows[position:]]), capacity=4, batch_size=2, seed=0)
        >>> sorted(row.item() for batch in buffer for row in batch)
        [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]
    """

    def __init__(
        self,
        source: Callable[[int], Iterator[Float[Tensor, "tokens models d_model"]]],
        *,
        capacity: int,
        batch_size: int,
        seed: int,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        drop_last: bool = False,
    ) -> None:
        if batch_size < 1 or capacity < batch_size:
            raise ConfigError(
                "The shuffle buffer is smaller than a batch",
                expected=f"at least {max(1, batch_size)} rows",
                found=f"capacity {capacity}, batch size {batch_size}",
            )
        self.batch_size = batch_size
        # Whole batches, so that none straddles two permutations and meets a slot twice.
        self.capacity = capacity - capacity % batch_size
        self.rows_read = 0
        self.device, self.dtype, self.drop_last = torch.device(device), dtype, drop_last
        self._source = source
        self._stream: Iterator[Tensor] | None = None
        self._chunk: Tensor | None = None
        self._rows: Tensor | None = None
        self._generator = torch.Generator().manual_seed(seed)
        # Slots in the order they are served; those of order[stale:cursor] were served and wait for new rows.
        # At first that is all of them.
        self._order = torch.arange(self.capacity, device=self.device)
        self._stale, self._cursor = 0, self.capacity
        self._ended = False

    def __iter__(self) -> Iterator[Float[Tensor, "tokens models d_model"]]:
        return self

    def __next__(self) -> Float[Tensor, "tokens models d_model"]:
        while self._stale < self._cursor and not self._ended:
            self._restock()
        if self._cursor == len(self._order) and not self._ended:
            self._order, self._stale, self._cursor = self._permutation(self.capacity), 0, 0
        size = min(self.batch_size, len(self._order) - self._cursor)
        if self._rows is None or size == 0 or (size < self.batch_size and self.drop_last):
            self.close()
            raise StopIteration
        slots = self._order[self._cursor : self._cursor + size]
        batch = self._rows.index_select(0, slots)
        self._cursor += size
        return batch

    def state_dict(self) -> dict[str, Tensor]:
        """All that the next batches depend on but the source; as a module's, these are the live tensors.

        Save or clone them before the next batch is taken.
        """
        counts = (self._cursor, self._stale, self.rows_read, int(self._ended), self.batch_size)
        empty = torch.empty(0, 0, 0, dtype=self.dtype, device=self.device)
        return {
            "rows": empty if self._rows is None else self._rows,
            "order": self._order,
            "counts": torch.tensor(counts),
            "generator": self._generator.get_state(),
        }

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on exactly where `state_dict` was taken; the source is started again at the row that comes next.

        Raises:
            ConfigError: The state is of a buffer of another capacity, batch size or type, or is none.
        """
        counts = self._checked(state)
        self.close()
        rows = state["rows"]
        if len(rows) == 0:
            self._rows = None
        else:
            if self._rows is None or self._rows.shape != rows.shape:
                self._rows = torch.empty(rows.shape, dtype=self.dtype, device=self.device)
            self._rows.copy_(rows)
        self._order = state["order"].to(self.device, copy=True)
        self._generator.set_state(state["generator"].cpu())
        self._cursor, self._stale, self.rows_read = counts["cursor"], counts["stale"], counts["rows_read"]
        self._ended = bool(counts["ended"])

    def close(self) -> None:
        """Stop reading the source; the next batch, if one is asked for, starts it again where it was."""
        stream, self._stream, self._chunk = self._stream, None, None
        if (close := getattr(stream, "close", None)) is not None:
            close()

    def _permutation(self, size: int) -> Tensor:
        # Drawn on the CPU, so that every device serves the same order; moved once per permutation.
        return torch.randperm(size, generator=self._generator).to(self.device)

    def _restock(self) -> None:
        """Overwrite served slots with rows of one chunk; when the source has ended, order what is left."""
        chunk = self._next_chunk()
        if chunk is None:
            if self.rows_read == 0:
                raise ConfigError("The source of activations is empty", expected="at least one row")
            live = torch.cat([self._order[: self._stale], self._order[self._cursor :]])
            self._order = live[self._permutation(len(live))]
            self._stale, self._cursor, self._ended = 0, 0, True
            return
        if self._rows is None:
            self._rows = torch.empty(
                self.capacity, *chunk.shape[1:], dtype=self.dtype, device=self.device, requires_grad=False
            )
        slots = self._order[self._stale : self._cursor]
        piece = chunk[: len(slots)].detach().to(self.device, self.dtype, non_blocking=True)
        self._rows.index_copy_(0, slots[: len(piece)], piece)
        # Only now, and together: an interrupt before this writes the same rows to the same slots again.
        count = len(piece)
        self._stale, self.rows_read, self._chunk = self._stale + count, self.rows_read + count, chunk[count:]

    def _next_chunk(self) -> Tensor | None:
        """What is left of the last chunk, or the next one that holds rows; None at the end."""
        if self._stream is None:
            self._stream = self._source(self.rows_read)
        while self._chunk is None or len(self._chunk) == 0:
            try:
                chunk = next(self._stream, None)
                if chunk is not None:
                    self._check_shape(chunk)
            except BaseException:
                # A generator that raised would seem to have ended.
                self.close()
                raise
            if chunk is None:
                return None
            self._chunk = chunk
        return self._chunk

    def _check_shape(self, chunk: Tensor) -> None:
        shape = None if self._rows is None else tuple(self._rows.shape[1:])
        if chunk.ndim != 3 or shape not in (None, tuple(chunk.shape[1:])):
            raise ConfigError(
                "The activations do not have the shape of those before them",
                expected=f"(tokens, {shape[0]}, {shape[1]})" if shape else "(tokens, models, d_model)",
                found=tuple(chunk.shape),
            )

    def _checked(self, state: dict[str, Tensor]) -> dict[str, int]:
        if missing := sorted(_STATE - state.keys()):
            raise ConfigError("This is no state of a shuffle buffer", found=f"no {', '.join(missing)}")
        rows, counts = state["rows"], dict(zip(_COUNTS, state["counts"].tolist(), strict=True))
        wanted = {"capacity": self.capacity, "batch size": self.batch_size, "type": str(self.dtype)}
        held = len(rows) or self.capacity
        found = {"capacity": held, "batch size": counts["batch_size"], "type": str(rows.dtype)}
        shape = None if self._rows is None else tuple(self._rows.shape[1:])
        if len(rows) and shape:
            wanted, found = wanted | {"row": shape}, found | {"row": tuple(rows.shape[1:])}
        if found != wanted or rows.ndim != 3:
            raise ConfigError(
                "The state is of another shuffle buffer",
                expected=wanted,
                found=found,
                fix="Resume with the capacity, batch size and type that the run began with",
            )
        return counts
