"""What is no pair is refused with a reason, and never read."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from helpers import randomize
from pair_fixture import adapt, fine_tune, load_hf, lora, save
from palimpsest.errors import NumericsError, PairError
from palimpsest.models import load_model, load_pair
from palimpsest.models.tokenizers import shared_tokenizer
from palimpsest.options import ModelOptions


@pytest.fixture
def copy(base, tmp_path):
    return shutil.copytree(base, tmp_path / "copy")


def edit_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_weights(path, change):
    from safetensors.torch import load_file, save_file

    weights = load_file(path)
    change(weights)
    save_file(weights, path, metadata={"format": "pt"})


def check_refused(base, tuned, reason, options=None):
    with pytest.raises(PairError, match=reason) as caught:
        load_pair(base, tuned, options)
    assert caught.value.expected is not None or caught.value.found is not None
    return caught.value


def test_other_shapes(base, tiny_llama):
    check_refused(base, tiny_llama(hidden_size=48), "width differs.*hidden_size 32.*48")
    check_refused(base, tiny_llama(num_hidden_layers=3), "number of layers differs.*num_hidden_layers 2.*3")


def test_a_tokenizer_that_disagrees_names_the_first_id(base, copy):
    path = copy / "tokenizer.json"
    content = json.loads(path.read_text())
    vocab = content["model"]["vocab"]
    by_id = {index: token for token, index in vocab.items()}
    for low, high in ((100, 101), (50, 51)):
        vocab[by_id[low]], vocab[by_id[high]] = high, low
    path.write_text(json.dumps(content))
    error = check_refused(base, copy, "disagree at id 50")
    assert (error.expected, error.found) == (repr(by_id[50]), repr(by_id[51]))


def test_a_tokenizer_with_other_merges(base, copy):
    path = copy / "tokenizer.json"
    content = json.loads(path.read_text())
    assert content["model"]["merges"]
    content["model"]["merges"] = []
    path.write_text(json.dumps(content))
    assert load_model(copy).tokenizer.get_vocab() == load_model(base).tokenizer.get_vocab()
    check_refused(base, copy, "split the same text differently at token")


def test_tokenizers_that_agree_give_the_bases(tiny_tokenizer):
    other = type(tiny_tokenizer)(tokenizer_object=tiny_tokenizer.backend_tokenizer)
    assert shared_tokenizer(tiny_tokenizer, other, "a", "b") is tiny_tokenizer
    assert shared_tokenizer(tiny_tokenizer, None, "a", "b") is tiny_tokenizer


@pytest.mark.parametrize("recorded", [None, "someone/elsewhere"])
def test_an_adapter_whose_shapes_do_not_fit(base, tiny_llama, adapter, tmp_path, recorded):
    other = shutil.copytree(adapter, tmp_path / "adapter")
    edit_json(other / "adapter_config.json", base_model_name_or_path=recorded)
    force = ModelOptions(force_base=True)
    check_refused(tiny_llama(hidden_size=48), other, "does not fit.*size mismatch", force)
    error = check_refused(tiny_llama(num_hidden_layers=3), other, "has no weights for some modules", force)
    assert "layers.2" in str(error.found)
    deeper = tmp_path / "deeper"
    adapt(tiny_llama(num_hidden_layers=3), deeper, lora())
    edit_json(deeper / "adapter_config.json", base_model_name_or_path=recorded)
    assert "layers.2" in str(check_refused(base, deeper, "modules that .* does not have", force).found)
    assert load_pair(base, other, force).kind == "adapter"


@pytest.mark.parametrize("name", ["other", "base"])
def test_an_adapter_recorded_on_another_base(base, tiny_tokenizer, tiny_llama, tmp_path, name):
    """The recorded base is there and holds other weights; that folders have one name proves nothing."""
    shutil.copytree(base, tmp_path / "base")
    other = shutil.copytree(tiny_llama(seed=8), tmp_path / "elsewhere" / name)
    adapt(tmp_path / "base", tmp_path / "adapter", lora())
    check_refused(other, tmp_path / "adapter", "trained on another base")
    assert load_pair(tmp_path / "base", tmp_path / "adapter").kind == "adapter"
    edit_json(tmp_path / "adapter" / "adapter_config.json", base_model_name_or_path="base")
    check_refused(other, tmp_path / "adapter", "trained on another base.*base, as its")
    twin = shutil.copytree(base, tmp_path / "twin")
    assert load_pair(twin, tmp_path / "adapter").kind == "adapter"


def test_adapters_that_cannot_be_switched(base, tmp_path):
    from peft import PrefixTuningConfig, PromptTuningConfig

    for name, config, reason in (
        ("bias", lora(bias="all"), 'Found: bias "all".*Merge'),
        ("own", lora(bias="lora_only"), 'Found: bias "lora_only"'),
        ("prompt", PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"), "virtual tokens"),
        ("prefix", PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"), "PREFIX_TUNING"),
    ):
        adapt(base, tmp_path / name, config)
        check_refused(base, tmp_path / name, reason)


def test_places_that_hold_no_model(base, copy, tmp_path):
    check_refused(base, tmp_path / "nowhere", "There is no .*nowhere")
    check_refused(tmp_path / "nowhere", base, "nowhere")
    check_refused(base, base / "config.json", "is a file")
    check_refused(base / "config.json", base, "config.json")
    check_refused(base, "nobody/nothing", "nobody/nothing")
    (tmp_path / "empty").mkdir()
    check_refused(base, tmp_path / "empty", "empty")
    check_refused(tmp_path / "empty", base, "empty")
    (copy / "config.json").write_text("{")
    check_refused(base, copy, "configuration")


def test_weights_that_cannot_be_read(base, copy):
    path = copy / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    check_refused(base, copy, "Cannot load the model")
    path.write_bytes(b"no safetensors")
    check_refused(base, copy, "Cannot load the model")
    path.unlink()
    check_refused(base, copy, "Cannot load the model.*no file named")
    (copy / "pytorch_model.bin").write_bytes(b"123")
    check_refused(base, copy, "Cannot load the model")


def test_a_checkpoint_that_lacks_weights_is_not_filled_with_random_ones(base, copy):
    edit_weights(copy / "model.safetensors", lambda w: w.pop("model.layers.1.mlp.up_proj.weight"))
    error = check_refused(base, copy, "lacks weights")
    assert error.found == "1 missing, such as model.layers.1.mlp.up_proj.weight"


def test_a_checkpoint_of_a_tied_model_lacks_nothing(tiny_tokenizer, tiny_llama, tmp_path):
    tied = tiny_llama(tie_word_embeddings=True)
    from safetensors import safe_open

    with safe_open(tied / "model.safetensors", "pt") as weights:
        assert "lm_head.weight" not in weights.keys()  # noqa: SIM118
    pair = load_pair(tied, fine_tune(tied, tmp_path / "tuned", tiny_tokenizer))
    assert pair.tuned.sites.head.module.weight is pair.tuned.model.get_input_embeddings().weight


@pytest.mark.parametrize(
    ("file", "content", "reason"),
    [
        ("adapter_config.json", "{", "is not JSON"),
        ("adapter_config.json", "[]", "no adapter configuration"),
        ("adapter_config.json", "{}", "does not fit"),
        ("adapter_model.safetensors", "short", "does not fit"),
        ("adapter_model.safetensors", None, "does not fit"),
    ],
)
def test_broken_adapters(base, adapter, tmp_path, file, content, reason):
    broken = shutil.copytree(adapter, tmp_path / "broken")
    (broken / file).unlink()
    if content is not None:
        (broken / file).write_text(content)
    check_refused(base, broken, reason)


def test_an_adapter_that_lacks_weights(base, adapter, tmp_path):
    broken = shutil.copytree(adapter, tmp_path / "broken")

    def change(weights):
        for name in [name for name in weights if "layers.1.mlp.up_proj" in name]:
            del weights[name]

    edit_weights(broken / "adapter_model.safetensors", change)
    assert "layers.1.mlp.up_proj" in str(check_refused(base, broken, "has no weights for some modules").found)


def test_nan_weights(base, adapter, tiny_tokenizer, copy, tmp_path):
    def change(weights):
        next(w for name, w in sorted(weights.items()) if "down_proj" in name)[0, 0] = torch.nan

    edit_weights(copy / "model.safetensors", change)
    with pytest.raises(NumericsError, match="copy gives logits that are not finite"):
        load_pair(base, copy)
    broken = shutil.copytree(adapter, tmp_path / "broken")
    edit_weights(broken / "adapter_model.safetensors", change)
    with pytest.raises(NumericsError, match="broken gives logits that are not finite"):
        load_pair(base, broken)


def test_a_model_that_is_no_decoder_is_refused(tiny_tokenizer, base, tmp_path):
    from transformers import T5Config, T5ForConditionalGeneration

    model = T5ForConditionalGeneration(
        T5Config(vocab_size=320, d_model=32, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
    )
    randomize(model)
    folder = save(model, tmp_path / "t5", tiny_tokenizer)
    with pytest.raises(PairError, match="Cannot load the model"):
        load_model(folder)
    assert load_hf(base).config.hidden_size == model.config.d_model
