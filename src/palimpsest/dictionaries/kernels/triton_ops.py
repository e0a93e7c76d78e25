"""The Triton backend (CUDA; on CPU under Triton's interpreter): see `kernels` for what each function promises.

No step's function makes the host wait for the device; `encode_above`, which is inference, waits once per tile for the
size of its result. All kernels are our own.
"""

from palimpsest.dictionaries.kernels.triton_rows import (
    by_latent,
    dense_is_faster,
    normalise_rows_,
    project_rows_,
    row_dot,
    row_sum,
)
from palimpsest.dictionaries.kernels.triton_select import encode_above, encode_batch_topk, encode_topk

__all__ = [
    "by_latent",
    "dense_is_faster",
    "encode_above",
    "encode_batch_topk",
    "encode_topk",
    "normalise_rows_",
    "project_rows_",
    "row_dot",
    "row_sum",
]
