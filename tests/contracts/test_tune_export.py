"""Constant adapters in other tools' formats, read back by those tools."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from helpers import assert_close, assert_not_close
from pair_fixture import adapt, load_hf
from palimpsest.cli.command import run_verb, verb_app
from palimpsest.cli.tune_export import export
from palimpsest.dictionaries import Dictionary
from palimpsest.errors import ConfigError, DictionaryError
from palimpsest.tune.adapter import LatentConfig, latent_layers
from palimpsest.tune.export import export_adapter

D_MODEL, LATENTS = 32, 48


@pytest.fixture(scope="module")
def base(tiny_llama):
    return tiny_llama(seed=3, num_hidden_layers=3)


@pytest.fixture(scope="module")
def dictionary(tmp_path_factory):
    torch.manual_seed(2)
    folder = tmp_path_factory.mktemp("dictionary") / "sae"
    Dictionary(D_MODEL, LATENTS, activation="topk", k=4).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def make(base, dictionary, tmp_path):
    """Write an adapter with random values; gives its folder and the adapted model."""

    def made(sites=("resid_post.1",), component="bias", **options):
        options = {"skip_ids": []} | options
        config = LatentConfig(
            target_hooks=[(dictionary, site) for site in sites], component=component, **options
        )
        return tmp_path / "adapter", adapt(base, tmp_path / "adapter", config, scale=0.3)

    return made


def ids():
    return torch.randint(3, 320, (2, 9), generator=torch.Generator().manual_seed(3))


@torch.no_grad()
def logits(model):
    return model(input_ids=ids()).logits


def steered(path, base):
    from lm_eval.models.hf_steered import SteeredModel

    return SteeredModel(pretrained=str(base), steer_path=str(path), device="cpu", dtype="float32")


def answers(model):
    """The harness' own log-likelihoods of a continuation."""
    from lm_eval.api.instance import Instance

    request = Instance("loglikelihood", {}, ("The river runs past", " the old mill"), 0)
    ((value, _),) = model.loglikelihood([request], disable_tqdm=True)
    return value


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("component", ["bias", "vector"])
def test_lm_evals_steered_model_gives_the_adapters_logits(make, base, tmp_path, component):
    pytest.importorskip("lm_eval")
    from lm_eval.models.huggingface import HFLM

    folder, model = make(
        ("resid_post.0", "mlp_out_post.1", "attn_out.2") if component == "bias" else ("resid_post.1",),
        component,
    )
    made = export_adapter(folder, "steered", tmp_path / "steer.pt")
    assert made.notes == []
    told = torch.load(made.path, weights_only=True)
    assert all(row["action"] == "add" and row["steering_coefficient"] == 1.0 for row in told.values())
    theirs = steered(made.path, base)
    with torch.no_grad():
        found = theirs.forward(input_ids=ids()).logits
    assert_close(found, logits(model), rtol=1e-4, atol=1e-5)
    assert_not_close(found, logits(load_hf(base)), atol=1e-2)
    tokenizer = theirs.tokenizer
    ours = HFLM(pretrained=model, tokenizer=tokenizer, device="cpu")
    plain = HFLM(pretrained=load_hf(base), tokenizer=tokenizer, device="cpu")
    assert answers(theirs) == pytest.approx(answers(ours), abs=1e-4)
    assert abs(answers(theirs) - answers(plain)) > 1e-2


def test_a_control_vector_is_what_llama_cpp_reads(make, tmp_path):
    gguf = pytest.importorskip("gguf")
    folder, model = make(("resid_post.1", "resid_post.2"))
    path = export_adapter(folder, "gguf", tmp_path / "steer.gguf").path
    read = gguf.GGUFReader(path)
    fields = {name: field.contents() for name, field in read.fields.items()}
    assert fields["general.architecture"] == "controlvector"
    assert fields["controlvector.model_hint"] == "llama" and fields["controlvector.layer_count"] == 2
    found = {tensor.name: torch.tensor(tensor.data) for tensor in read.tensors}
    assert found.keys() == {"direction.1", "direction.2"}
    for layer in latent_layers(model):
        vector = layer.component().weight.detach() @ layer.dictionary.W_dec[:, 0]
        assert_close(found[f"direction.{layer.site[-1]}"], vector, rtol=1e-5, atol=1e-6)
        assert found[f"direction.{layer.site[-1]}"].dtype == torch.float32


def test_layers_without_a_vector_get_zeros(make, tmp_path):
    gguf = pytest.importorskip("gguf")
    folder, _ = make(("resid_post.2",))
    read = gguf.GGUFReader(export_adapter(folder, "gguf", tmp_path / "steer.gguf").path)
    found = {tensor.name: tensor.data for tensor in read.tensors}
    assert found.keys() == {"direction.1", "direction.2"}
    assert not found["direction.1"].any() and found["direction.2"].any()


@pytest.mark.parametrize("component", ["bias", "vector"])
@pytest.mark.parametrize("options", [{}, {"forbid": list(range(0, LATENTS, 3))}, {"latents": [5, 7, 40]}])
def test_plain_vectors_added_by_hand_give_the_adapter(make, base, tmp_path, component, options):
    if component == "vector" and options:
        pytest.skip("a dense vector knows no latents")
    sites = ("resid_pre.0", "resid_pre.1", "attn_out.2")
    folder, model = make(sites, component, **options)
    made = export_adapter(folder, "vector", tmp_path / "v.safetensors")
    vectors = load_file(made.path)
    assert set(vectors) == set(sites) and made.sites == sorted(sites)
    with safe_open(made.path, "pt") as handle:
        assert handle.metadata()["component"] == component and "/" not in handle.metadata()["base"]
    plain = load_hf(base)
    layers = plain.model.layers

    def after(v):
        return lambda module, args, output: (
            output + v if torch.is_tensor(output) else (output[0] + v, *output[1:])
        )

    layers[0].register_forward_pre_hook(lambda module, args: (args[0] + vectors["resid_pre.0"], *args[1:]))
    layers[0].register_forward_hook(after(vectors["resid_pre.1"]))
    layers[2].self_attn.register_forward_hook(after(vectors["attn_out.2"]))
    assert_close(logits(plain), logits(model), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"skip_ids": None}, "leaves 2 token ids alone"),
        ({"skip_ids": [4, 5]}, "leaves 2 token ids alone"),
        ({"scope": "answer"}, "scope answer only"),
    ],
)
def test_what_an_export_cannot_say_is_noted(make, tmp_path, options, words):
    folder, _ = make(**options)
    (note,) = export_adapter(folder, "steered", tmp_path / "steer.pt").notes
    assert words in note


@pytest.mark.parametrize(
    ("changes", "to", "words"),
    [
        (
            {"component": "scale"},
            "steered",
            "depends on the token.*Expected: an adapter with component bias or vector",
        ),
        ({"component": "active-bias"}, "vector", "depends on the token"),
        ({"sites": ("resid_post.0",)}, "gguf", "cannot be added at resid_post.0"),
        ({"sites": ("mlp_out.1",)}, "gguf", "cannot be added at mlp_out.1"),
        ({"sites": ("resid_pre.1",)}, "steered", "resid_pre.1 is none"),
        ({}, "onnx", "Unknown format"),
    ],
)
def test_what_a_format_cannot_hold_is_refused(make, tmp_path, changes, to, words):
    folder, _ = make(**changes)
    out = tmp_path / {"steered": "s.pt", "gguf": "s.gguf", "vector": "s.safetensors"}.get(to, "s.onnx")
    with pytest.raises(ConfigError, match=words):
        export_adapter(folder, to, out)
    assert not out.exists() and not list(tmp_path.glob(".s*"))


def test_files_are_named_and_kept(make, tmp_path):
    folder, _ = make()
    for to, name in (("steered", "s.csv"), ("gguf", "s.pt"), ("vector", "s.gguf")):
        with pytest.raises(ConfigError, match="does not fit the format"):
            export_adapter(folder, to, tmp_path / name)
    out = export_adapter(folder, "vector", tmp_path / "new" / "v.safetensors").path
    before = {site: vector.clone() for site, vector in load_file(out).items()}
    with pytest.raises(ConfigError, match="exists"):
        export_adapter(folder, "vector", out)
    out.write_bytes(b"something else")
    again = load_file(export_adapter(folder, "vector", out, overwrite=True).path)
    assert again.keys() == before.keys() and all(torch.equal(again[site], before[site]) for site in before)
    with pytest.raises(ConfigError, match="exists"):
        (tmp_path / "folder.pt").mkdir()
        export_adapter(folder, "steered", tmp_path / "folder.pt", overwrite=True)


def test_other_adapters_and_broken_ones_are_refused(make, base, dictionary, tmp_path):
    from pair_fixture import lora

    adapt(base, tmp_path / "lora", lora())
    for folder, words in (
        (tmp_path / "lora", "no latent adapter"),
        (tmp_path / "nothing", "holds no adapter"),
    ):
        with pytest.raises(ConfigError, match=words):
            export_adapter(folder, "vector", tmp_path / "v.safetensors")
    folder, _ = make()
    path = folder / "adapter_model.safetensors"
    (name,), values = load_file(path), load_file(path)
    for broken, words in (
        (values[name][:-1], "do not fit"),
        (values[name] * float("nan"), "not finite"),
    ):
        save_file({name: broken.clone()}, path)
        with pytest.raises(ConfigError, match=words):
            export_adapter(folder, "vector", tmp_path / "v.safetensors")
    path.write_bytes(b"no")
    with pytest.raises(ConfigError, match="Cannot read"):
        export_adapter(folder, "vector", tmp_path / "v.safetensors")


def test_two_sites_around_one_module_are_told_apart(make, tmp_path):
    folder, _ = make(("resid_pre.0", "resid_post.0"))
    export_adapter(folder, "vector", tmp_path / "v.safetensors")
    vectors = load_file(tmp_path / "v.safetensors")
    assert set(vectors) == {"resid_pre.0", "resid_post.0"}
    assert not torch.equal(*vectors.values())


def test_two_names_of_one_place_are_refused_when_the_adapter_is_made(make):
    with pytest.raises(ConfigError, match="one place"):
        make(("mlp_out.1", "mlp_out_post.1"))


def test_another_dictionary_is_refused(base, dictionary, tmp_path):
    own = shutil.copytree(dictionary, tmp_path / "sae")
    adapt(
        base, tmp_path / "adapter", LatentConfig(target_hooks=[(str(own), "resid_post.1")], component="bias")
    )
    export_adapter(tmp_path / "adapter", "vector", tmp_path / "v.safetensors")
    shutil.rmtree(own)
    torch.manual_seed(9)
    Dictionary(D_MODEL, LATENTS, activation="topk", k=4).save_pretrained(own)
    with pytest.raises(DictionaryError, match="another one than"):
        export_adapter(tmp_path / "adapter", "vector", tmp_path / "w.safetensors")


def test_the_command(make, tmp_path, capsys):
    folder, _ = make(skip_ids=None)
    app = verb_app("tune", "Tune.")
    app.command(export, name="export")
    out = str(tmp_path / "s.pt")
    assert run_verb("tune", app, ["export", str(folder), "--to", "steered", "--out", out]) == 0
    said = capsys.readouterr().out
    assert "resid_post.1" in said and "token ids alone" in said and "--model steered" in said
    assert run_verb("tune", app, ["export", str(folder), "--to", "steered", "--out", out]) == 2
    assert "exists" in capsys.readouterr().err
    arguments = ["export", str(folder), "--to", "steered", "--out", out, "--overwrite", "--json"]
    assert run_verb("tune", app, arguments) == 0
    assert json.loads(capsys.readouterr().out)["sites"] == ["resid_post.1"]
