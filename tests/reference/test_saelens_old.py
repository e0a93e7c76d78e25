"""Flat configurations of SAELens before version 6, against what SAELens makes of the same folder today."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import peers
from palimpsest.dictionaries import load_dictionary
from palimpsest.dictionaries.formats.saelens import header
from palimpsest.errors import DictionaryError

D_MODEL, LATENTS, K = 10, 30, 4
pytestmark = pytest.mark.filterwarnings("default")

VERSION_5 = {
    "architecture": "standard",
    "d_in": D_MODEL,
    "d_sae": LATENTS,
    "activation_fn_str": "relu",
    "activation_fn_kwargs": {},
    "apply_b_dec_to_input": True,
    "finetuning_scaling_factor": False,
    "context_size": 128,
    "model_name": "gpt2-small",
    "hook_name": "blocks.4.hook_resid_pre",
    "hook_layer": 4,
    "hook_head_index": None,
    "prepend_bos": True,
    "dataset_path": "Skylion007/openwebtext",
    "dataset_trust_remote_code": True,
    "normalize_activations": "none",
    "dtype": "torch.float32",
    "device": "cuda",
    "sae_lens_training_version": "5.3.1",
    "model_from_pretrained_kwargs": {},
    "neuronpedia_id": "gpt2-small/4-res-jb",
}
VERSION_1 = {
    "model_name": "gpt2-small",
    "hook_point": "blocks.8.hook_resid_pre",
    "hook_point_layer": 8,
    "hook_point_head_index": None,
    "dataset_path": "Skylion007/openwebtext",
    "context_size": 128,
    "d_in": D_MODEL,
    "d_sae": LATENTS,
    "l1_coefficient": 8e-5,
    "device": "mps",
    "dtype": "torch.float32",
}


@pytest.fixture(scope="module")
def sae_lens():
    return peers.sae_lens()


def write(folder, config, **extra):
    """Random weights, decoder rows of very different length and a bias that matters, beside a configuration."""
    vectors = ["b_gate", "r_mag", "b_mag"] if config.get("architecture") == "gated" else ["b_enc"]
    tensors = {name: torch.randn(LATENTS) * 0.5 for name in vectors}
    tensors |= {
        "W_enc": torch.randn(D_MODEL, LATENTS) * 0.6,
        "W_dec": torch.randn(LATENTS, D_MODEL) * (torch.rand(LATENTS, 1) * 3 + 0.2),
        "b_dec": torch.randn(D_MODEL),
    }
    if config.get("architecture") == "jumprelu":
        tensors["threshold"] = torch.rand(LATENTS)
    save_file(tensors | extra, folder / "sae_weights.safetensors")
    (folder / "cfg.json").write_text(json.dumps(config))
    return folder


def agree(sae_lens, folder, shape=(D_MODEL,)):
    theirs, ours = sae_lens.SAE.load_from_disk(folder), load_dictionary(folder)
    x = torch.randn(50, *shape) * torch.rand(50, *[1 for _ in shape]) * 6 + 0.5
    with torch.no_grad():
        expected, codes = theirs.encode(x), ours.encode(x.flatten(1))
        assert (expected > 0).any() and (expected == 0).any()
        torch.testing.assert_close(codes.dense(), expected, atol=2e-5, rtol=2e-5)
        again = theirs.decode(expected).flatten(1)
        torch.testing.assert_close(ours.decode(codes), again, atol=2e-5, rtol=2e-5)
    return ours


@pytest.mark.parametrize("norm", ["none", "layer_norm", "constant_norm_rescale", False, None])
@pytest.mark.parametrize("kind", ["standard", "topk", "topk-named", "jumprelu", "gated"])
def test_version_5_is_read_as_saelens_reads_it(sae_lens, tmp_path, kind, norm):
    change = {"architecture": kind, "normalize_activations": norm}
    if kind.startswith("topk"):
        change |= {"activation_fn_str": "topk", "activation_fn_kwargs": {"k": K}}
        change["architecture"] = "topk" if kind == "topk-named" else "standard"
    ours = agree(sae_lens, write(tmp_path, {**VERSION_5, **change}))
    assert ours.site == "resid_pre.4" and ours.metadata["model"] == "openai-community/gpt2"
    assert ours.k == (K if kind.startswith("topk") else None)
    assert ours.metadata["saelens"]["neuronpedia_id"] == "gpt2-small/4-res-jb"
    names = {"layer_norm": "layer_norm", "constant_norm_rescale": "unit_rms"}
    assert ours.input_norm == names.get(norm)


@pytest.mark.parametrize("subtract", [True, False])
def test_whether_the_bias_is_subtracted(sae_lens, tmp_path, subtract):
    ours = agree(sae_lens, write(tmp_path, {**VERSION_5, "apply_b_dec_to_input": subtract}))
    assert ours.apply_b_dec_to_input is subtract


def test_a_topk_architecture_need_not_name_its_function(sae_lens, tmp_path):
    named = {"architecture": "topk", "activation_fn_kwargs": {"k": K}}
    for config in (VERSION_5, {name: VERSION_5[name] for name in VERSION_5 if name != "activation_fn_str"}):
        assert agree(sae_lens, write(tmp_path, {**config, **named})).k == K


def test_version_1_named_less(sae_lens, tmp_path):
    ours = agree(sae_lens, write(tmp_path, VERSION_1, scaling_factor=torch.ones(LATENTS)))
    assert ours.site == "resid_pre.8" and ours.activation == "relu" and ours.apply_b_dec_to_input
    notes = " ".join(header(tmp_path).notes)
    assert "does not say how its model was loaded" in notes and "fold" not in notes
    write(tmp_path, {**VERSION_1, "model_name": "gemma-2b"})
    assert header(tmp_path).notes == ()  # no LayerNorm, nothing that was centred
    write(tmp_path, VERSION_5)
    assert header(tmp_path).notes == ()


def test_heads_were_reshaped_without_being_asked(sae_lens, tmp_path):
    ours = agree(
        sae_lens, write(tmp_path, {**VERSION_1, "hook_point": "blocks.2.attn.hook_z"}), (2, D_MODEL // 2)
    )
    notes = " ".join(header(tmp_path).notes)
    assert ours.site == "z.2" and "side by side" in notes and "value biases" in notes


@pytest.mark.parametrize("name", ["scaling_factor", "finetuning_scaling_factor"])
@pytest.mark.parametrize("kind", ["standard", "topk", "gated"])
def test_a_fine_tuning_scale_multiplies_what_latents_write(tmp_path, kind, name):
    """`SAE.decode` of version 5: (activations * scale) @ W_dec + b_dec; version 6 cannot load such a file."""
    config = {**VERSION_5, "architecture": kind, "finetuning_scaling_factor": True}
    if kind == "topk":
        config |= {"activation_fn_str": "topk", "activation_fn_kwargs": {"k": K}}
    scale = torch.rand(LATENTS) * 2 + 0.1
    write(tmp_path, {**config, "finetuning_scaling_factor": False})
    unscaled = load_dictionary(tmp_path)
    stored = load_file(tmp_path / "sae_weights.safetensors")
    (tmp_path / "cfg.json").write_text(json.dumps(config))
    save_file({**stored, name: scale}, tmp_path / "sae_weights.safetensors")
    ours = load_dictionary(tmp_path)
    x = torch.randn(40, D_MODEL)
    codes = ours.encode(x)
    torch.testing.assert_close(codes.dense(), unscaled.encode(x).dense())
    expected = (codes.dense() * scale) @ stored["W_dec"] + stored["b_dec"]
    torch.testing.assert_close(ours.decode(codes), expected)
    assert any(name in note for note in header(tmp_path).notes)
    some = [3, 20]
    torch.testing.assert_close(load_dictionary(tmp_path, latents=some).W_dec, ours.W_dec[some])


def test_a_scale_that_the_configuration_denies(tmp_path):
    write(tmp_path, VERSION_5, scaling_factor=torch.rand(LATENTS))
    with pytest.raises(DictionaryError, match="scales its activations.*finetuning_scaling_factor true"):
        load_dictionary(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"activation_fn_str": "tanh-relu"}, "Expected: relu.*Found: tanh-relu"),
        ({"activation_fn_str": "topk", "architecture": "gated"}, "Found: topk"),
        ({"activation_fn_str": "topk", "activation_fn_kwargs": {}}, "needs k"),
        ({"normalize_activations": True}, "expected_average_only_in"),
        ({"normalize_activations": "expected_average_only_in"}, "was not saved"),
        ({"is_transcoder": True}, "another site"),
        ({"architecture": "transcoder"}, "another site"),
        ({"d_sae": None}, "gives no d_sae"),
        ({"d_in": 0}, "gives no d_in"),
        ({"d_in": D_MODEL + 1}, "W_dec"),
    ],
)
def test_what_cannot_be_read_exactly(tmp_path, change, message):
    write(tmp_path, {**VERSION_5, **change} if change.get("architecture") != "gated" else VERSION_5)
    (tmp_path / "cfg.json").write_text(json.dumps({**VERSION_5, **change}))
    with pytest.raises(DictionaryError, match=message):
        header(tmp_path)


def test_only_one_head(tmp_path):
    write(tmp_path, {**VERSION_1, "hook_point": "blocks.2.attn.hook_z", "hook_point_head_index": 3})
    found = header(tmp_path)
    assert "site" not in found.metadata and found.metadata["saelens"]["hook_head_index"] == 3
    assert any("head 3" in note for note in found.notes)
