"""A small store of numbers that tell which row they are, and the calls that write it."""

from __future__ import annotations

from pathlib import Path

import torch

from palimpsest.artifacts import RunFolder
from palimpsest.store import StoreWriter

SITES = ("resid_post.1", "mlp_out.0")
D_MODEL = 6
CONFIG = {"corpus": "a", "sites": list(SITES)}


def appended(first: int, count: int, seed: int = 0) -> dict:
    """Rows of `count` whole documents of 1 to 5 tokens, the values unique per row."""
    generator = torch.Generator().manual_seed(1000 * seed + first)
    lengths = [(first + i) % 5 + 1 for i in range(count)]
    document = torch.cat([torch.full((n,), first + i) for i, n in enumerate(lengths)])
    position = torch.cat([torch.arange(n) for n in lengths])
    shape = (len(document), 2, D_MODEL)
    acts = {site: torch.randn(shape, generator=generator) * 3 + 1 for site in SITES}
    return {"acts": acts, "token_ids": document * 100 + position, "document": document, "position": position}


def write(
    path: Path, calls: list[dict], *, finish: bool = True, shard_bytes: int = 2000, **run
) -> StoreWriter:
    dtype, probe = run.pop("dtype", "float32"), run.pop("probe", False)
    with RunFolder(path, stage="store", config=CONFIG, **run) as folder:
        writer = StoreWriter(
            folder,
            sites=SITES,
            models=("base", "tuned"),
            d_model=D_MODEL,
            dtype=dtype,
            shard_bytes=shard_bytes,
        )
        for call in calls:
            if not writer.holds(call["document"]):
                if probe:
                    writer.add_probe(**probe_of(call))
                writer.append(
                    call["acts"], **{name: call[name] for name in ("token_ids", "document", "position")}
                )
        if finish:
            writer.finish()
    return writer


CALLS = [appended(first, 4) for first in range(0, 40, 4)]


def joined(calls: list[dict], site: str) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.cat([call["acts"][site] for call in calls]), torch.cat([call["token_ids"] for call in calls])


def probe_of(call: dict) -> dict:
    """The padded token rows of a call, as a harvest would offer them to a probe."""
    documents = call["document"].unique().tolist()
    lengths = [int((call["document"] == one).sum()) for one in documents]
    shape = (len(documents), max(lengths))
    found = {
        "input_ids": torch.zeros(shape, dtype=torch.long),
        "attention_mask": torch.zeros(shape, dtype=torch.bool),
        "document": torch.full(shape, -1),
    }
    for row, (one, length) in enumerate(zip(documents, lengths, strict=True)):
        found["input_ids"][row, :length] = call["token_ids"][call["document"] == one]
        found["attention_mask"][row, :length] = True
        found["document"][row, :length] = one
    return found | {"keep": found["attention_mask"].clone(), "compute": torch.float32}
