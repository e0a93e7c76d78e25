"""The documents a store keeps for the live check, and stores whose writer was killed."""

import json
import signal
from pathlib import Path

import pytest
import torch

from helpers import REPOSITORY, python_source
from palimpsest.errors import ArtifactError
from palimpsest.store import ActivationStore
from palimpsest.store.probe import ProbeRows
from store_fixture import CALLS, probe_of, write

KILLED = """
import os, signal, sys
sys.path[:0] = [sys.argv[1]]
import torch
torch.set_num_threads(1)
import palimpsest.store.writer as writer
from palimpsest.artifacts import RunFolder
from store_fixture import CALLS, write

point, where = sys.argv[3], int(sys.argv[4])
calls = []
die = lambda: os.kill(os.getpid(), signal.SIGKILL)

if point == "inside a shard":
    inner = writer.save_file
    def save_file(tensors, path):
        inner(tensors, path)
        calls.append(path)
        if len(calls) == where:
            os.truncate(path, os.path.getsize(path) // 2)
            die()
    writer.save_file = save_file
elif point == "before its entry":
    inner = writer.StoreWriter._save_index
    def save_index(self):
        calls.append(0)
        if len(calls) == where:
            die()
        inner(self)
    writer.StoreWriter._save_index = save_index
else:
    def finish(self, **fields):
        die()
    RunFolder.finish = finish
write(sys.argv[2], CALLS, probe=True)
"""


def test_a_probe_holds_the_first_documents_whole(tmp_path):
    write(tmp_path / "s", CALLS, probe=True)
    probe = ActivationStore(tmp_path / "s").probe()
    first = probe_of(CALLS[0])
    assert probe is not None and probe.compute == "float32"
    for name in ("input_ids", "attention_mask", "keep", "document"):
        assert torch.equal(getattr(probe, name), first[name].to(getattr(probe, name).dtype))
    assert probe.document.unique().tolist() == [-1, 0, 1, 2, 3]


def test_a_probe_is_small_and_skips_rows_without_kept_tokens():
    rows = ProbeRows(documents=3, tokens=30)
    ids = torch.arange(500).reshape(5, 100)
    mask, keep = torch.ones(5, 100, dtype=torch.bool), torch.ones(5, 100, dtype=torch.bool)
    keep[1] = False
    keep[2, :10] = False  # kept tokens only behind what a probe takes
    mask[3, 4:] = keep[3, 4:] = False
    document = torch.arange(5)[:, None].expand(5, 100)
    rows.add(ids, mask, keep, document, "float32")
    rows.add(ids, mask, keep, document + 10, "float32")
    found = rows.tensors()
    assert [row.max().item() for row in found["document"]] == [0, 3, 4]
    assert found["input_ids"].shape == (3, 10)
    assert found["attention_mask"].sum(1).tolist() == [10, 4, 10]
    assert torch.equal(found["input_ids"][1], torch.tensor([300, 301, 302, 303, 0, 0, 0, 0, 0, 0]).int())


def test_a_store_without_a_probe_has_none_and_one_with_another_is_refused(tmp_path):
    write(tmp_path / "old", CALLS)
    assert ActivationStore(tmp_path / "old").probe() is None
    write(tmp_path / "s", CALLS, probe=True)
    path = tmp_path / "s" / "probe.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(ArtifactError, match=r"probe\.safetensors is damaged"):
        ActivationStore(tmp_path / "s").probe()


def contents(path: Path) -> dict[str, bytes]:
    """Every file that says what the store holds; the manifest says when and for how long as well."""
    files = {file.name: file.read_bytes() for file in path.iterdir() if file.name != "manifest.json"}
    manifest = json.loads((path / "manifest.json").read_text())
    return files | {"manifest.json": json.dumps(manifest["files"], sort_keys=True).encode()}


@pytest.mark.parametrize(
    ("point", "where"),
    [
        ("inside a shard", 1),  # the probe
        ("inside a shard", 2),
        ("inside a shard", 4),
        ("before its entry", 2),
        ("before its entry", 4),
        ("before the end", 0),
    ],
)
def test_a_killed_writer_resumes_to_the_very_same_store(tmp_path, point, where):
    write(tmp_path / "whole", CALLS, probe=True)
    folder = tmp_path / "killed"
    done = python_source(KILLED, REPOSITORY / "tests", folder, point, where)
    assert done.returncode == -signal.SIGKILL, done.stderr
    with pytest.raises(ArtifactError, match="not finished"):
        ActivationStore(folder)
    kept = ActivationStore(folder, allow_running=True)
    whole = ActivationStore(tmp_path / "whole")
    assert kept.shards == whole.shards[: len(kept.shards)]
    assert (len(kept.shards) < len(whole.shards)) == (point != "before the end")
    assert len(list(kept.batches(16, whole.sites[0]))) > 0 or not kept.shards
    write(folder, CALLS, probe=True, resume=True)
    assert contents(folder) == contents(tmp_path / "whole")
