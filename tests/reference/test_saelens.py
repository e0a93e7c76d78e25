"""SAELens' folders against the sae-lens package itself: read theirs, write ours, same numbers both ways."""

import json
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file

from palimpsest.dictionaries import Dictionary, load_dictionary, save_saelens
from palimpsest.dictionaries.saelens import HOOKS, hook_of_site, site_of_hook
from palimpsest.errors import DictionaryError

D_MODEL, LATENTS, K = 10, 30, 4
pytestmark = pytest.mark.filterwarnings("default")


@pytest.fixture(scope="module")
def sae_lens():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            import sae_lens
        except ImportError as error:
            pytest.skip(f"sae-lens cannot be imported: {error}")
    return sae_lens


def randomised(sae):
    """Random values in every parameter, decoder rows of very different length included."""
    with torch.no_grad():
        for name, parameter in sae.named_parameters():
            parameter.copy_(torch.randn(parameter.shape) * 0.6)
            if "threshold" in name:
                parameter.abs_()
        sae.W_dec.mul_(torch.rand(LATENTS, 1) * 3 + 0.2)
    return sae


def fields(subtract, **extra):
    return {"d_in": D_MODEL, "d_sae": LATENTS, "apply_b_dec_to_input": subtract, "device": "cpu", **extra}


def about(sae_lens):
    from sae_lens.saes.sae import SAEMetadata

    return SAEMetadata(
        model_name="gpt2", hook_name="blocks.5.hook_resid_post", context_size=64, prepend_bos=True
    )


def agree(theirs, ours, tolerance=1e-5):
    x = torch.randn(50, D_MODEL)
    with torch.no_grad():
        expected, codes = theirs.encode(x), ours.encode(x)
        assert (expected > 0).any()
        torch.testing.assert_close(codes.dense(), expected, atol=tolerance, rtol=tolerance)
        torch.testing.assert_close(
            ours.decode(codes), theirs.decode(expected), atol=tolerance, rtol=tolerance
        )


@pytest.mark.parametrize("subtract", [True, False])
@pytest.mark.parametrize("kind", ["standard", "topk", "topk-rescaled", "jumprelu", "gated"])
def test_their_inference_models_are_read(sae_lens, tmp_path, kind, subtract):
    classes = {
        "standard": (sae_lens.StandardSAE, sae_lens.StandardSAEConfig, {}),
        "topk": (sae_lens.TopKSAE, sae_lens.TopKSAEConfig, {"k": K}),
        "topk-rescaled": (
            sae_lens.TopKSAE,
            sae_lens.TopKSAEConfig,
            {"k": K, "rescale_acts_by_decoder_norm": True},
        ),
        "jumprelu": (sae_lens.JumpReLUSAE, sae_lens.JumpReLUSAEConfig, {}),
        "gated": (sae_lens.GatedSAE, sae_lens.GatedSAEConfig, {}),
    }
    made, config, extra = classes[kind]
    theirs = randomised(made(config(**fields(subtract, metadata=about(sae_lens), **extra))))
    theirs.save_model(tmp_path)
    ours = load_dictionary(tmp_path)
    agree(theirs, ours)
    assert ours.site == "resid_post.5" and ours.metadata["model"] == "gpt2"
    assert ours.k == (K if kind.startswith("topk") else None)
    if kind == "topk-rescaled":
        torch.testing.assert_close(ours.decoder_norms(), torch.ones(LATENTS, 1))
    again = sae_lens.SAE.load_from_disk(save_saelens(ours, tmp_path / "again"))
    agree(again, ours)


@pytest.mark.parametrize("rescale", [True, False])
@pytest.mark.parametrize("kind", ["standard", "topk", "batchtopk", "matryoshka", "jumprelu", "gated"])
def test_their_trained_models_are_read(sae_lens, tmp_path, kind, rescale):
    classes = {
        "standard": (sae_lens.StandardTrainingSAE, sae_lens.StandardTrainingSAEConfig, {}),
        "topk": (sae_lens.TopKTrainingSAE, sae_lens.TopKTrainingSAEConfig, {"k": K}),
        "batchtopk": (sae_lens.BatchTopKTrainingSAE, sae_lens.BatchTopKTrainingSAEConfig, {"k": K}),
        "matryoshka": (
            sae_lens.MatryoshkaBatchTopKTrainingSAE,
            sae_lens.MatryoshkaBatchTopKTrainingSAEConfig,
            {"k": K, "matryoshka_widths": [7, LATENTS]},
        ),
        "jumprelu": (sae_lens.JumpReLUTrainingSAE, sae_lens.JumpReLUTrainingSAEConfig, {}),
        "gated": (sae_lens.GatedTrainingSAE, sae_lens.GatedTrainingSAEConfig, {}),
    }
    made, config, extra = classes[kind]
    if "k" in extra:
        extra = {**extra, "rescale_acts_by_decoder_norm": rescale}
    trained = randomised(made(config(**fields(True, **extra))))
    if kind in ("batchtopk", "matryoshka"):
        trained.topk_threshold.fill_(1.3)
    trained.save_inference_model(tmp_path / "inference")
    theirs = sae_lens.SAE.load_from_disk(tmp_path / "inference")
    ours = load_dictionary(tmp_path / "inference")
    agree(theirs, ours)
    names = {"standard": "relu", "topk": "topk", "gated": "gated"}
    assert ours.activation == names.get(kind, "jumprelu")

    trained.save_model(tmp_path / "training")
    again = load_dictionary(tmp_path / "training")
    agree(theirs, again)
    from_batches = kind in ("batchtopk", "matryoshka")
    assert again.activation == ("batch_topk" if from_batches else ours.activation)
    if kind == "matryoshka":
        assert again.prefixes == (7, LATENTS) and again.prefix(7).n_latents == 7


@pytest.mark.parametrize("rescale", [True, False])
def test_a_saved_input_scale_is_folded(sae_lens, tmp_path, rescale):
    from sae_lens.training.activation_scaler import ActivationScaler

    extra = {
        "k": K,
        "normalize_activations": "expected_average_only_in",
        "rescale_acts_by_decoder_norm": rescale,
    }
    trained = randomised(
        sae_lens.BatchTopKTrainingSAE(sae_lens.BatchTopKTrainingSAEConfig(**fields(True, **extra)))
    )
    trained.topk_threshold.fill_(0.8)
    trained.save_model(tmp_path)
    with pytest.raises(DictionaryError, match="scale was not saved"):
        load_dictionary(tmp_path)
    ActivationScaler(scaling_factor=0.37).save(str(tmp_path / "activation_scaler.json"))
    ours = load_dictionary(tmp_path)
    trained.fold_activation_norm_scaling_factor(0.37)
    trained.save_inference_model(tmp_path / "inference")
    agree(sae_lens.SAE.load_from_disk(tmp_path / "inference"), ours)


def ours_with_random_weights(activation, subtract=True):
    made = Dictionary(
        D_MODEL,
        LATENTS,
        activation=activation,
        k=K if "topk" in activation else None,
        apply_b_dec_to_input=subtract,
        metadata={"model": "gpt2", "site": "resid_post.3"},
    )
    with torch.no_grad():
        for tensor in made.state_dict().values():
            tensor.copy_(torch.randn(tensor.shape) * 0.6)
        if made.threshold is not None:
            made.threshold.abs_()
    return made.requires_grad_(False)


@pytest.mark.parametrize("subtract", [True, False])
@pytest.mark.parametrize("activation", ["relu", "topk", "batch_topk", "jumprelu", "gated"])
def test_theirs_reads_what_ours_writes(sae_lens, tmp_path, activation, subtract):
    ours = ours_with_random_weights(activation, subtract)
    theirs = sae_lens.SAE.load_from_disk(save_saelens(ours, tmp_path))
    agree(theirs, ours)
    assert theirs.cfg.metadata.hook_name == "blocks.3.hook_resid_post"
    assert theirs.cfg.metadata.model_name == "gpt2"
    agree(theirs, load_dictionary(tmp_path))


def test_pairs_and_occupied_folders_are_not_written(tmp_path):
    pair = Dictionary(D_MODEL, LATENTS, k=K, models=2, view="pair")
    with pytest.raises(DictionaryError, match="two models"):
        save_saelens(pair, tmp_path / "pair")
    save_saelens(ours_with_random_weights("topk"), tmp_path / "made")
    with pytest.raises(DictionaryError, match="already holds"):
        save_saelens(ours_with_random_weights("topk"), tmp_path / "made")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architecture": "transcoder"}, "transcoder"),
        ({"architecture": "gated"}, "b_gate"),
        ({"architecture": None}, "architecture"),
        ({"normalize_activations": "layer_norm"}, "layer_norm"),
        ({"normalize_activations": "constant_norm_rescale"}, "constant_norm_rescale"),
        ({"normalize_activations": "expected_average_only_in"}, "save_inference_model"),
        ({"d_in": D_MODEL + 1}, "contradict"),
        ({"d_sae": "many"}, "d_sae"),
        ({"k": LATENTS + 1}, "k is larger"),
        ({"k": None}, "needs k"),
        ({"architecture": "jumprelu"}, "threshold"),
        ({"metadata": ...}, "before version 6"),
    ],
)
def test_configurations_that_cannot_be_read_exactly(tmp_path, change, message):
    save_saelens(ours_with_random_weights("topk"), tmp_path)
    config = {**json.loads((tmp_path / "cfg.json").read_text()), **change}
    config = {name: value for name, value in config.items() if value is not ...}
    (tmp_path / "cfg.json").write_text(json.dumps(config))
    with pytest.raises(DictionaryError, match=message):
        load_dictionary(tmp_path)


def test_damaged_files(tmp_path):
    save_saelens(ours_with_random_weights("topk"), tmp_path)
    weights, config = tmp_path / "sae_weights.safetensors", tmp_path / "cfg.json"
    whole, text = weights.read_bytes(), config.read_text()
    tensors = load_file(weights)

    save_file({**tensors, "W_dec": tensors["W_dec"].T.contiguous()}, weights)
    with pytest.raises(DictionaryError, match="W_dec"):
        load_dictionary(tmp_path)
    save_file({**tensors, "b_enc": tensors["b_enc"] / 0}, weights)
    with pytest.raises(DictionaryError, match="b_enc .*infinity"):
        load_dictionary(tmp_path)
    save_file({name: t for name, t in tensors.items() if name != "b_dec"}, weights)
    with pytest.raises(DictionaryError, match="b_dec"):
        load_dictionary(tmp_path)
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DictionaryError, match="no readable safetensors"):
        load_dictionary(tmp_path)
    torch.save(tensors, weights)
    with pytest.raises(DictionaryError, match="no readable safetensors"):
        load_dictionary(tmp_path)
    weights.unlink()
    with pytest.raises(DictionaryError, match="holds no sae_weights"):
        load_dictionary(tmp_path)
    weights.write_bytes(whole)
    config.write_text(text[:-5])
    with pytest.raises(DictionaryError, match="no readable JSON"):
        load_dictionary(tmp_path)
    config.unlink()
    with pytest.raises(DictionaryError, match=r"holds no cfg\.json"):
        load_dictionary(tmp_path)


def test_hooks_and_sites_are_each_others_inverse():
    for hook, point in HOOKS.items():
        assert site_of_hook(f"blocks.7.{hook}") == f"{point}.7"
        assert hook_of_site(f"{point}.7") == f"blocks.7.{hook}"
    assert site_of_hook("blocks.7.ln2.hook_normalized") is None and site_of_hook(None) is None
    assert hook_of_site("mlp_act.3") is None and hook_of_site(None) is None


def test_hooks_mean_what_interp_engine_says():
    from interp_engine.mappers import tlens_hook_to_point

    for hook, point in HOOKS.items():
        if hook not in ("hook_mlp_out", "hook_attn_out"):
            assert str(tlens_hook_to_point(f"blocks.7.{hook}")) == f"{point}.7"
