"""Activations on disk: round trip, shuffling, resume, damage."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from palimpsest.artifacts import RunFolder
from palimpsest.errors import ArtifactError, ConfigError, NumericsError, SiteError
from palimpsest.store import ActivationStore, Moments, StoreWriter
from store_fixture import CALLS, CONFIG, D_MODEL, SITES, appended, joined, write


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("site", SITES)
def test_rows_come_back_in_order_and_in_type(tmp_path, dtype, site):
    write(tmp_path / "s", CALLS, dtype=dtype)
    store = ActivationStore(tmp_path / "s")
    acts, ids = joined(CALLS, site)
    batches = list(store.batches(7, site))
    assert len(store.shards) >= 3
    assert store.rows == len(acts)
    assert torch.equal(torch.cat([batch.acts for batch in batches]), acts.to(getattr(torch, dtype)))
    assert torch.equal(torch.cat([batch.token_ids for batch in batches]).long(), ids)
    assert {len(batch.acts) for batch in batches[:-1]} == {7}
    assert (store.sites, store.models, store.d_model) == (list(SITES), ["base", "tuned"], D_MODEL)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 200), st.integers(1, 9), st.integers(0, 5))
def test_shuffled_batches_hold_every_row_once_and_keep_rows_whole(tmp_path_factory, size, window, seed):
    path = tmp_path_factory.getbasetemp() / "shared-store"
    if not path.exists():
        write(path, CALLS)
    acts, ids = joined(CALLS, SITES[0])
    row_of = {int(one): i for i, one in enumerate(ids)}
    batches = list(ActivationStore(path).batches(size, SITES[0], seed=seed, window=window))
    rows = [row_of[int(one)] for batch in batches for one in batch.token_ids]
    assert sorted(rows) == list(range(len(acts)))
    assert torch.equal(torch.cat([batch.acts for batch in batches]), acts[rows])
    assert all(len(batch.acts) == size for batch in batches[:-1])
    for batch in batches:
        assert torch.equal(batch.token_ids, batch.document * 100 + batch.position)


def test_a_seed_repeats_and_another_differs(tmp_path):
    write(tmp_path / "s", CALLS)
    store = ActivationStore(tmp_path / "s")
    orders = [
        torch.cat([b.token_ids for b in store.batches(8, SITES[0], seed=seed)]).tolist() for seed in (1, 1, 2)
    ]
    assert orders[0] == orders[1] != orders[2]
    assert orders[0] != joined(CALLS, SITES[0])[1].tolist()


def test_shuffling_holds_no_more_shards_than_its_window(tmp_path, monkeypatch):
    write(tmp_path / "s", CALLS)
    store = ActivationStore(tmp_path / "s")
    opened = []
    inner = store.open_shard
    monkeypatch.setattr(store, "open_shard", lambda shard: opened.append(shard) or inner(shard))
    batches = store.batches(4, SITES[0], seed=3, window=2)
    next(batches)
    assert len(opened) == 2 < len(store.shards)


def test_statistics_are_those_of_all_rows(tmp_path):
    write(tmp_path / "s", CALLS)
    store = ActivationStore(tmp_path / "s")
    for site in SITES:
        acts = joined(CALLS, site)[0].double()
        moments = store.statistics[site]
        assert moments.count == len(acts)
        torch.testing.assert_close(moments.mean, acts.mean(0), rtol=1e-12, atol=1e-12)
        expected = acts.square().sum(-1).mean(0).sqrt()
        torch.testing.assert_close(moments.rms_norm, expected, rtol=1e-12, atol=1e-12)


def test_moments_keep_their_precision_far_from_zero():
    values = torch.randn(4000, 1, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(5)) + 1e6
    moments = Moments(1, 3)
    for part in values.split([1, 0, 700, 3299]):
        moments.add(part)
    torch.testing.assert_close(moments.mean, values.mean(0), rtol=1e-14, atol=0)
    again = Moments.from_state(json.loads(json.dumps(moments.state())))
    assert torch.equal(again.mean, moments.mean) and torch.equal(again.rms_norm, moments.rms_norm)


@pytest.mark.parametrize("cut", [0, 1, 4, 7, 9])
def test_an_interrupted_store_resumes_to_the_same_rows(tmp_path, cut):
    write(tmp_path / "whole", CALLS)
    write(tmp_path / "s", CALLS[:cut], finish=False)
    kept = ActivationStore(tmp_path / "s", allow_running=True)
    listed = {int(one) for i in range(len(kept.shards)) for one in kept.labels(i)["document"]}
    stored = {int(one) for call in CALLS[: cut - cut % 2] for one in call["document"]}
    assert listed == stored  # two calls fill a shard: a cut loses only what was still pending
    writer = write(tmp_path / "s", CALLS, resume=True)
    assert writer.folder.resumed
    store, whole = ActivationStore(tmp_path / "s"), ActivationStore(tmp_path / "whole")
    ids = [torch.cat([b.token_ids for b in one.batches(64, SITES[1])]) for one in (store, whole)]
    assert torch.equal(ids[0].sort().values, ids[1].sort().values)
    torch.testing.assert_close(store.statistics[SITES[0]].mean, whole.statistics[SITES[0]].mean)


def test_resume_leaves_out_rows_of_held_documents_in_batches_of_another_cut(tmp_path):
    write(tmp_path / "s", CALLS[:5], finish=False, shard_bytes=1)
    shifted = [appended(2, 20), appended(22, 18)]  # the first call is held in part
    writer = write(tmp_path / "s", shifted, resume=True)
    assert writer.rows == sum(len(call["document"]) for call in CALLS)
    store = ActivationStore(tmp_path / "s")
    ids = torch.cat([batch.token_ids for batch in store.batches(64, SITES[0])]).tolist()
    assert sorted(ids) == sorted(joined(CALLS, SITES[0])[1].tolist())


def test_a_shard_written_but_not_listed_is_replaced(tmp_path):
    write(tmp_path / "s", CALLS[:6], finish=False, shard_bytes=1)
    index = json.loads((tmp_path / "s" / "store.json").read_text())
    index["shards"] = index["shards"][:-1]  # killed between the shard and its entry
    (tmp_path / "s" / "store.json").write_text(json.dumps(index))
    write(tmp_path / "s", CALLS, resume=True, shard_bytes=1)
    ids = torch.cat([b.token_ids for b in ActivationStore(tmp_path / "s").batches(64, SITES[0])])
    assert torch.equal(ids.long(), joined(CALLS, SITES[0])[1])


def test_an_unfinished_store_opens_only_when_asked(tmp_path):
    write(tmp_path / "s", CALLS[:6], finish=False, shard_bytes=1)
    with pytest.raises(ArtifactError, match="not finished"):
        ActivationStore(tmp_path / "s")
    store = ActivationStore(tmp_path / "s", allow_running=True)
    assert store.rows == sum(len(call["document"]) for call in CALLS[:6])


def flip(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 4
    path.write_bytes(data)


@pytest.mark.parametrize("place", [3, 200, -1])
def test_a_flipped_bit_is_refused_by_name(tmp_path, place):
    write(tmp_path / "s", CALLS)
    flip(tmp_path / "s" / "shard-00001.safetensors", place)
    store = ActivationStore(tmp_path / "s")
    with pytest.raises(ArtifactError, match=r"shard-00001\.safetensors is damaged"):
        list(store.batches(8, SITES[0]))


def test_a_truncated_missing_or_edited_file_is_refused_by_name(tmp_path):
    for name in ("cut", "gone", "edited"):
        write(tmp_path / name, CALLS)
    shard = tmp_path / "cut" / "shard-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(ArtifactError, match=r"shard-00002\.safetensors is damaged"):
        ActivationStore(tmp_path / "cut")
    (tmp_path / "gone" / "shard-00000.safetensors").unlink()
    with pytest.raises(ArtifactError, match=r"shard-00000\.safetensors"):
        ActivationStore(tmp_path / "gone")
    index = tmp_path / "edited" / "store.json"
    index.write_text(index.read_text().replace("resid_post.1", "resid_post.2"))
    with pytest.raises(ArtifactError, match=r"store\.json is damaged"):
        ActivationStore(tmp_path / "edited")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_activations_that_are_no_numbers_stop_the_run(tmp_path, value):
    call = appended(0, 4)
    call["acts"][SITES[1]][2, 1, 0] = value
    with pytest.raises(NumericsError, match="tuned at mlp_out.0.*row 2"):
        write(tmp_path / "s", [call])


def test_a_full_disk_keeps_the_shards_before_it(tmp_path, monkeypatch):
    import palimpsest.store.writer as module

    inner, written = module.save_file, []

    def fill(tensors, path):
        written.append(path)
        if len(written) == 3:
            Path(path).write_bytes(b"half")
            raise OSError(28, "No space left on device")
        inner(tensors, path)

    monkeypatch.setattr(module, "save_file", fill)
    with pytest.raises(ArtifactError, match="No space left"):
        write(tmp_path / "s", CALLS)
    assert len(ActivationStore(tmp_path / "s", allow_running=True).shards) == 2
    assert len(list((tmp_path / "s").glob("shard-*"))) == 2
    monkeypatch.undo()
    write(tmp_path / "s", CALLS, resume=True)
    assert ActivationStore(tmp_path / "s").rows == sum(len(call["document"]) for call in CALLS)


def test_layouts_that_make_no_sense_are_refused(tmp_path):
    with RunFolder(tmp_path / "s", stage="store", config=CONFIG) as folder:
        for change in ({"dtype": "float16"}, {"sites": ()}, {"models": ()}, {"sites": ("a", "a")}):
            layout = {"sites": SITES, "models": ("base",), "d_model": D_MODEL} | change
            with pytest.raises(ConfigError):
                StoreWriter(folder, **layout)
        writer = StoreWriter(folder, sites=SITES, models=("base",), d_model=D_MODEL)
        call = CALLS[0]
        labels = {name: call[name] for name in ("token_ids", "document", "position")}
        with pytest.raises(ValueError, match="expected .*1, 6"):
            writer.append(call["acts"], **labels)
        with pytest.raises(ArtifactError, match="empty"):
            writer.finish()


def test_resume_with_another_layout_is_refused(tmp_path):
    write(tmp_path / "s", CALLS[:6], finish=False)
    with (
        pytest.raises(ArtifactError, match="another layout"),
        RunFolder(tmp_path / "s", stage="store", config=CONFIG, resume=True) as folder,
    ):
        StoreWriter(folder, sites=SITES[:1], models=("base", "tuned"), d_model=D_MODEL, dtype="float32")


def test_an_unknown_site_and_a_finished_store_are_refused(tmp_path):
    write(tmp_path / "s", CALLS)
    store = ActivationStore(tmp_path / "s")
    with pytest.raises(SiteError, match="resid_post.9"):
        store.batches(8, "resid_post.9")
    with pytest.raises(ConfigError):
        store.batches(0, SITES[0])
    with pytest.raises(ArtifactError, match="finished"):
        write(tmp_path / "s", CALLS, resume=True)
    assert np.isfinite(store.statistics[SITES[0]].rms_norm.numpy()).all()
