"""SAELens' folders against the sae-lens package itself: read theirs, write ours, same numbers both ways."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import peers
from palimpsest.dictionaries import Dictionary, load_dictionary, save_saelens
from palimpsest.dictionaries.formats.saelens import SAELENS, header, write
from palimpsest.errors import DictionaryError

D_MODEL, LATENTS, K = 10, 30, 4
pytestmark = pytest.mark.filterwarnings("default")


@pytest.fixture(scope="module")
def sae_lens():
    return peers.sae_lens()


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
    with pytest.raises(DictionaryError, match="was not saved"):
        load_dictionary(tmp_path)
    ActivationScaler(scaling_factor=0.37).save(str(tmp_path / "activation_scaler.json"))
    ours = load_dictionary(tmp_path)
    trained.fold_activation_norm_scaling_factor(0.37)
    trained.save_inference_model(tmp_path / "inference")
    agree(sae_lens.SAE.load_from_disk(tmp_path / "inference"), ours)
    (tmp_path / "activation_scaler.json").write_text('{"scaling_factor": -1}')
    with pytest.raises(DictionaryError, match="gives no scale"):
        load_dictionary(tmp_path)


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
        ({"architecture": "transcoder"}, "transcoder: it writes at another site"),
        ({"architecture": "skip_transcoder"}, "another site"),
        ({"d_out": D_MODEL}, "another site"),
        ({"metadata": {"hook_name_out": "blocks.3.hook_mlp_out"}}, "another site"),
        ({"architecture": "temporal"}, "the tokens before it"),
        ({"architecture": "matching_pursuit"}, "one after another"),
        ({"architecture": "abstopk"}, "negative"),
        ({"architecture": "phase_mux"}, "Expected: standard, topk, batchtopk.*Found: phase_mux"),
        ({"architecture": "gated"}, "b_gate"),
        ({"architecture": None}, "architecture"),
        ({"normalize_activations": "expected_average_only_in"}, "save_inference_model"),
        ({"normalize_activations": "covariance_whitening"}, "save_inference_model"),
        ({"normalize_activations": "unit"}, "layer_norm, constant_norm_rescale"),
        ({"d_in": D_MODEL + 1}, "contradict"),
        ({"d_sae": "many"}, "d_sae"),
        ({"k": LATENTS + 1}, "k is larger"),
        ({"k": None}, "needs k"),
        ({"k": "many"}, "no configuration of SAELens in k.*'many'"),
        ({"matryoshka_widths": 7}, "in matryoshka_widths"),
        ({"matryoshka_widths": [5, 9]}, "end with 30"),
        ({"metadata": {"hook_name": 3, "model_from_pretrained_kwargs": "x"}}, "hook_name, model_from_"),
        ({"activation_fn_kwargs": "x", "activation_fn": "topk", "k": None, "metadata": ...}, "needs k"),
        ({"architecture": "jumprelu"}, "threshold"),
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
    with pytest.raises(DictionaryError, match="torch checkpoint named as safetensors"):
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


NORMS = {"layer_norm": "layer_norm", "constant_norm_rescale": "unit_rms"}


@pytest.mark.parametrize("subtract", [True, False])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("kind", ["Standard", "TopK", "JumpReLU", "Gated"])
def test_normalisations_of_every_token_both_ways(sae_lens, tmp_path, kind, norm, subtract):
    extra = {"k": K, "rescale_acts_by_decoder_norm": True} if kind == "TopK" else {}
    config = getattr(sae_lens, f"{kind}SAEConfig")(
        **fields(subtract, metadata=about(sae_lens), normalize_activations=norm, **extra)
    )
    theirs = randomised(getattr(sae_lens, f"{kind}SAE")(config))
    theirs.save_model(tmp_path)
    ours = load_dictionary(tmp_path)
    assert ours.input_norm == NORMS[norm]
    x = torch.randn(50, D_MODEL) * torch.rand(50, 1) * 20 + torch.randn(50, 1) * 3
    again = sae_lens.SAE.load_from_disk(save_saelens(ours, tmp_path / "again"))
    for one in (theirs, again):
        expected = one.encode(x)
        codes = ours.encode(x)
        torch.testing.assert_close(codes.dense(), expected, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(ours.decode(codes), one.decode(expected), atol=1e-4, rtol=1e-4)
    plain = load_dictionary(save_saelens(ours_with_random_weights("relu"), tmp_path / "plain"))
    assert plain.input_norm is None


def test_a_threshold_that_was_trained_as_a_logarithm(tmp_path):
    ours = ours_with_random_weights("jumprelu")
    save_saelens(ours, tmp_path)
    tensors = load_file(tmp_path / "sae_weights.safetensors")
    tensors["log_threshold"] = tensors.pop("threshold").log()
    save_file(tensors, tmp_path / "sae_weights.safetensors")
    torch.testing.assert_close(load_dictionary(tmp_path).threshold, ours.threshold)


def test_the_heads_side_by_side(sae_lens, tmp_path):
    config = sae_lens.StandardSAEConfig(**fields(True, reshape_activations="hook_z"))
    config.metadata.hook_name, config.metadata.model_name = "blocks.2.attn.hook_z", "gpt2-small"
    theirs = randomised(sae_lens.StandardSAE(config))
    theirs.save_model(tmp_path)
    found, ours = header(tmp_path), load_dictionary(tmp_path)
    assert ours.site == "z.2" and any("side by side" in note for note in found.notes)
    again = sae_lens.SAE.load_from_disk(save_saelens(ours, tmp_path / "again"))
    heads = torch.randn(20, 2, D_MODEL // 2)
    codes = ours.encode(heads.flatten(1))
    for one in (theirs, again):
        assert one.hook_z_reshaping_mode
        torch.testing.assert_close(codes.dense(), one.encode(heads))
        torch.testing.assert_close(ours.decode(codes), one.decode(one.encode(heads)).flatten(1))

    config = json.loads((tmp_path / "cfg.json").read_text())
    config["metadata"]["hook_head_index"] = 1
    (tmp_path / "cfg.json").write_text(json.dumps(config))
    found = header(tmp_path)
    assert "site" not in found.metadata and any("head 1" in note for note in found.notes)


@pytest.mark.parametrize(
    ("activation", "rescale"),
    [("relu", False), ("batch_topk", False), ("batch_topk", True), ("jumprelu", False), ("gated", False)],
)
def test_some_latents_are_the_whole_selected(sae_lens, tmp_path, activation, rescale):
    if activation == "batch_topk":
        extra = {"k": K, "normalize_activations": "expected_average_only_in"}
        config = sae_lens.BatchTopKTrainingSAEConfig(
            **fields(True, rescale_acts_by_decoder_norm=rescale, **extra)
        )
        trained = randomised(sae_lens.BatchTopKTrainingSAE(config))
        trained.topk_threshold.fill_(0.9)
        trained.save_model(tmp_path)
        (tmp_path / "activation_scaler.json").write_text('{"scaling_factor": 0.6}')
    else:
        save_saelens(ours_with_random_weights(activation), tmp_path)
    some = [7, 0, 29, 8]
    whole, part = load_dictionary(tmp_path), load_dictionary(tmp_path, latents=some)
    assert part.n_latents == 4
    x = torch.randn(40, D_MODEL)
    torch.testing.assert_close(part.encode(x).dense(), whole.encode(x).dense()[:, some])
    torch.testing.assert_close(part.W_dec, whole.W_dec[some])


def test_the_weights_file_names_the_folder(tmp_path):
    ours = ours_with_random_weights("topk")
    save_saelens(ours, tmp_path)
    assert SAELENS.matches(tmp_path) and SAELENS.matches(tmp_path / "sae_weights.safetensors")
    assert torch.equal(load_dictionary(tmp_path / "sae_weights.safetensors").W_enc, ours.W_enc)
    assert not SAELENS.matches(tmp_path / "cfg.json") and not SAELENS.matches(tmp_path / "nowhere")
    (tmp_path / "cfg.json").rename(tmp_path / "config.json")
    assert not SAELENS.matches(tmp_path)  # Llamascopium's names
    assert not SAELENS.matches(tmp_path / "sae_weights.safetensors")
    (tmp_path / "cfg.json").write_text('{"num_latents": 8, "d_in": 4, "k": 2}')
    (tmp_path / "sae_weights.safetensors").unlink()
    assert not SAELENS.matches(tmp_path)  # sparsify's
    (tmp_path / "cfg.json").write_text("[]")
    assert not SAELENS.matches(tmp_path)


def test_what_evaluation_asks_of_the_metadata_is_written(sae_lens, tmp_path):
    ours = ours_with_random_weights("topk")
    ours.metadata |= {"tokens": 1000, "corpus": ["text"], "metrics": {"fve": 0.9}}
    theirs = sae_lens.SAE.load_from_disk(save_saelens(ours, tmp_path)).cfg
    about = theirs.metadata
    assert (about.hook_layer, about.prepend_bos, about.model_from_pretrained_kwargs) == (3, True, {})
    assert (theirs.d_in, theirs.d_sae, theirs.dtype) == (D_MODEL, LATENTS, "float32")
    again = load_dictionary(tmp_path).metadata
    assert {name: again[name] for name in ours.metadata} == ours.metadata


def test_their_metadata_survives_a_round_trip(sae_lens, tmp_path):
    from sae_lens.saes.sae import SAEMetadata

    kept = {
        "model_name": "gpt2-small",
        "hook_name": "blocks.5.hook_resid_pre",
        "context_size": 128,
        "prepend_bos": False,
        "neuronpedia_id": "gpt2-small/5-res-jb",
        "dataset_path": "Skylion007/openwebtext",
        "model_from_pretrained_kwargs": {"center_writing_weights": True},
    }
    config = sae_lens.StandardSAEConfig(**fields(True, metadata=SAEMetadata(**kept)))
    randomised(sae_lens.StandardSAE(config)).save_model(tmp_path)
    found, ours = header(tmp_path), load_dictionary(tmp_path)
    assert ours.metadata["model"] == "openai-community/gpt2" and ours.site == "resid_pre.5"
    assert ours.metadata["saelens"].items() >= kept.items()
    assert any("have mean 0 over d_model" in note for note in found.notes)
    assert any("without a BOS" in note for note in found.notes)
    again = sae_lens.SAE.load_from_disk(save_saelens(ours, tmp_path / "again")).cfg.metadata
    assert {name: again[name] for name in kept} == kept


@pytest.mark.parametrize(
    ("change", "model", "hook", "said"),
    [
        ({"center_writing_weights": True}, "gpt2-small", "blocks.1.hook_mlp_out", True),
        ({"center_writing_weights": True}, "gemma-2-2b", "blocks.1.hook_resid_post", False),
        ({"center_writing_weights": True}, "gpt2-small", "blocks.1.mlp.hook_post", False),
        ({"center_writing_weights": False}, "gpt2-small", "blocks.1.hook_resid_post", False),
        (None, "gpt2-small", "blocks.1.hook_resid_post", False),
    ],
)
def test_centred_weights_are_told_where_they_matter(tmp_path, change, model, hook, said):
    save_saelens(ours_with_random_weights("relu"), tmp_path)
    config = json.loads((tmp_path / "cfg.json").read_text())
    config["metadata"] |= {
        "model_from_pretrained_kwargs": change,
        "model_name": model,
        "hook_name": hook,
    }
    (tmp_path / "cfg.json").write_text(json.dumps(config))
    assert any("mean 0" in note for note in header(tmp_path).notes) is said


def test_what_the_directory_knows_counts(sae_lens, tmp_path):
    """SAELens' list of releases corrects one normalisation, and has scales that no file holds."""
    config = sae_lens.StandardSAEConfig(**fields(True, normalize_activations="expected_average_only_in"))
    theirs = randomised(sae_lens.StandardSAE(config))
    theirs.save_model(tmp_path)
    with pytest.raises(DictionaryError, match="was not saved"):
        header(tmp_path)
    found = header(tmp_path, {"norm_scaling_factor": 1.7, "neuronpedia_id": "gpt2-small/5-res-jb"})
    assert found.extras["scale"] == 1.7
    assert found.metadata["saelens"]["neuronpedia_id"] == "gpt2-small/5-res-jb"
    stored = load_file(tmp_path / "sae_weights.safetensors")
    made = SAELENS.convert(found, lambda name, axis=None: stored[name])
    theirs.fold_activation_norm_scaling_factor(1.7)
    torch.testing.assert_close(made["W_enc"][0], theirs.W_enc.data)
    torch.testing.assert_close(made["b_dec"][0], theirs.b_dec.data)

    save_saelens(ours_with_random_weights("relu"), tmp_path / "plain")
    found = header(tmp_path / "plain", {"normalize_activations": "constant_norm_rescale"})
    assert found.fields["input_norm"] == "unit_rms"
    assert any("corrects normalize_activations" in note for note in found.notes)


def test_what_cannot_be_written_is_said(tmp_path):
    made = Dictionary(
        D_MODEL, LATENTS, activation="batch_topk", k=2.5, view="diff", prefixes=[4, LATENTS], metadata={}
    ).requires_grad_(False)
    (tmp_path / "made").mkdir()
    lost = " ".join(write(made, tmp_path / "made"))
    for word in ("2.5", "4, 30", "difference", "no hook"):
        assert word in lost
    again = load_dictionary(tmp_path / "made")
    assert (again.view, again.activation, again.prefixes) == ("diff", "jumprelu", ())
    assert write(ours_with_random_weights("jumprelu"), tmp_path / "made") == []


def test_bfloat16_stays(sae_lens, tmp_path):
    ours = ours_with_random_weights("jumprelu").to(torch.bfloat16)
    theirs = sae_lens.SAE.load_from_disk(save_saelens(ours, tmp_path))
    again = load_dictionary(tmp_path)
    assert theirs.dtype == again.dtype == torch.bfloat16
    assert torch.equal(again.W_enc, ours.W_enc) and torch.equal(again.threshold, ours.threshold)


def test_a_release_brings_what_its_directory_says(sae_lens, tmp_path, monkeypatch):
    """This release was saved with a normalisation whose scale only SAELens' directory holds."""
    release, own = "gpt2-small-mlp-tm", "blocks.0.hook_mlp_out"
    path = "sae_group_gpt2_blocks.0.hook_mlp_out_24576:v1"
    config = sae_lens.StandardSAEConfig(
        **fields(True, metadata=about(sae_lens), normalize_activations="expected_average_only_in")
    )
    theirs = randomised(sae_lens.StandardSAE(config))
    theirs.save_model(tmp_path / path)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *args, **named: str(tmp_path))
    monkeypatch.chdir(tmp_path)
    ours = load_dictionary(f"{release}/{own}")
    theirs.fold_activation_norm_scaling_factor(1.049317316132615)
    agree(theirs, ours)
    assert ours.metadata["hub"]["release"] == release and ours.metadata["hub"]["id"] == own
    assert ours.metadata["saelens"]["model_from_pretrained_kwargs"] == {"center_writing_weights": True}
