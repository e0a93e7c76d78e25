"""The right weights are compared: revisions of adapters, the adapter's own base, one dtype on both sides."""

import json
import shutil

import pytest
import torch

from pair_fixture import adapt, load_hf, lora
from palimpsest.errors import PairError
from palimpsest.models import fingerprint, load_pair, weight_deltas
from palimpsest.options import ModelOptions


def record(folder, base):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": str(base)}))


def test_the_revision_of_an_adapter_is_the_one_that_is_read(base, tmp_path, monkeypatch):
    import huggingface_hub

    repository = tmp_path / "models--someone--lora"
    for revision, commit, scale in (("main", "a" * 40, 0.1), ("early", "b" * 40, 0.0)):
        folder = repository / "snapshots" / commit
        adapt(base, folder, lora(), scale=scale)
        record(folder, base)
        (repository / "refs").mkdir(parents=True, exist_ok=True)
        (repository / "refs" / revision).write_text(commit)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))

    def change(revision):
        pair = load_pair(base, "someone/lora", ModelOptions(tuned_revision=revision))
        return sum(layer.norm_delta for layer in weight_deltas(pair))

    assert change("main") > 0 and change("early") == 0


def test_the_base_saved_again_in_another_dtype_is_still_the_base(base, adapter, tiny_tokenizer, tmp_path):
    again = tmp_path / "base32"
    shutil.copytree(base, again)
    load_hf(base).to(torch.bfloat16).save_pretrained(again)
    copy = shutil.copytree(adapter, tmp_path / "adapter")
    record(copy, base)
    assert load_pair(again, copy).notes == []


def test_a_base_under_another_name_needs_the_users_word(base, adapter, tmp_path):
    copy = shutil.copytree(adapter, tmp_path / "adapter")
    record(copy, "someone/elsewhere")
    with pytest.raises(PairError, match="trained on another base.*someone/elsewhere.*--force-base"):
        load_pair(base, copy)
    pair = load_pair(base, copy, ModelOptions(force_base=True))
    assert len(pair.notes) == 1 and "someone/elsewhere" in pair.notes[0]


def test_both_sides_are_read_in_the_dtype_of_the_base(base, tmp_path):
    """Identical weights stored in two dtypes must not look like a fine-tune."""
    narrow = tmp_path / "narrow"
    shutil.copytree(base, narrow)
    load_hf(base).to(torch.bfloat16).save_pretrained(narrow)
    wide = tmp_path / "wide"
    shutil.copytree(base, wide)
    load_hf(narrow).float().save_pretrained(wide)
    pair = load_pair(wide, narrow, ModelOptions(device_map="cpu"))
    assert pair.base.dtype == pair.tuned.dtype == torch.float32
    assert fingerprint(pair.base) == fingerprint(pair.tuned)


def test_a_cpu_computes_in_float32_whatever_the_checkpoint_holds(base, adapter, tmp_path):
    narrow = tmp_path / "narrow"
    shutil.copytree(base, narrow)
    load_hf(base).to(torch.bfloat16).save_pretrained(narrow)
    copy = shutil.copytree(adapter, tmp_path / "adapter")
    record(copy, base)
    for tuned in (base, copy):
        pair = load_pair(narrow, tuned, ModelOptions(device="cpu"))
        assert pair.base.dtype == pair.tuned.dtype == torch.float32
    assert load_pair(narrow, base, ModelOptions(device="cpu", dtype="bfloat16")).tuned.dtype == torch.bfloat16
