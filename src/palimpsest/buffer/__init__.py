"""Between a source of activations and a trainer: mixing in memory, with exact state, and reading ahead."""

from palimpsest.buffer.prefetch import Prefetched, prefetch
from palimpsest.buffer.shuffle import ShuffleBuffer, buffer_capacity

__all__ = ["Prefetched", "ShuffleBuffer", "buffer_capacity", "prefetch"]
