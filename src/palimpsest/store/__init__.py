"""Activations on disk: appended shard by shard, read back shuffled, with memory bounded on both sides."""

from palimpsest.store.moments import Moments
from palimpsest.store.probe import Probe
from palimpsest.store.reader import ActivationStore, StoreBatch
from palimpsest.store.shards import DTYPES
from palimpsest.store.writer import StoreWriter

__all__ = ["DTYPES", "ActivationStore", "Moments", "Probe", "StoreBatch", "StoreWriter"]
