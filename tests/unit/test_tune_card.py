"""The model card of an adapter: everything that is known, nothing of this machine, and no markup of others."""

from __future__ import annotations

import json
import re

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from huggingface_hub import ModelCard

from palimpsest.errors import ArtifactError
from palimpsest.tune.card import write_card

SITE = "resid_post.13"
RESULT = {
    "schema": 1,
    "component": "scale",
    "method": "scale",
    "objective": "dpo",
    "sites": [
        {"site": SITE, "dictionary": "/home/me/dictionaries/sae", "sha256": "ab" * 32, "latents": 16384}
    ],
    "objective_value": {
        "before": 0.6931,
        "after": 0.5,
        "difference": -0.1931,
        "ci": [-0.25, -0.125],
        "unit": "nats per pair",
        "rows": 40,
    },
    "heldout_loss": {"before": 2.5, "after": 2.25, "difference": -0.25, "ci": [-0.3, -0.2], "tokens": 4000},
    "margin": {"after": 0.75, "ci": [0.5, 1.0], "accuracy": 0.8},
    "general": {"kl": 0.0125, "ci": [0.01, 0.015], "loss_before": 3.0, "loss_after": 3.01, "tokens": 5000},
    "parameters": 16384,
    "latents_moved": 900,
    "lr": 0.03,
    "steps": 30,
    "seconds": 12.5,
    "stopped": None,
    "lm_eval": None,
    "model": "/home/me/models/base",
    "rows": {"train": 270, "heldout": 30},
}


def folder(
    path,
    *,
    base="owner/base-2b",
    dictionary="/home/me/dictionaries/sae",
    values=None,
    data=("/data/x/pairs.jsonl",),
):
    """An adapter folder as `tune` leaves it, without weights."""
    config = {
        "peft_type": "LATENT",
        "component": "scale",
        "transform": "identity",
        "scope": "all",
        "base_model_name_or_path": base,
        "target_hooks": [[dictionary, SITE]],
        "hashes": {SITE: "ab" * 32},
    }
    path.mkdir()
    (path / "adapter_config.json").write_text(json.dumps(config))
    (path / "manifest.json").write_text(json.dumps({"config": {"objective": {"data": list(data)}}}))
    values = {7: 0.5, 80: -2.0, 8802: 1.25, 3: 0.0} if values is None else values
    rows = [{"step": 10, "site": SITE, "latent": 9999, "value": 50.0}]
    rows += [{"step": 30, "site": SITE, "latent": latent, "value": value} for latent, value in values.items()]
    table = pa.Table.from_pylist(rows)
    pq.write_table(table.set_column(0, "step", table["step"].cast(pa.int32())), path / "latents.parquet")
    return path


def body(card):
    return card.content.split("---\n", 2)[2]


def test_the_card_says_what_is_known(tmp_path):
    path = write_card(folder(tmp_path / "helpful"), RESULT, labels={SITE: {80: "semicolons"}})
    card = ModelCard.load(path)
    assert card.data.library_name == "peft" and card.data.base_model == "owner/base-2b"
    assert card.data.license is None and "palimpsest" in card.data.tags
    text = body(card)
    assert "# helpful" in text and "`(1 + g(s)) * z`" in text
    for words in (SITE, "`sae`", "ab" * 32, "16,384", "900", "pairs.jsonl", "dpo", "0.03", "270"):
        assert words in text, words
    assert "| 0.6931 | 0.5 | -0.1931 (-0.25 to -0.125) |" in text
    assert "| 2.5 | 2.25 | -0.25 (-0.3 to -0.2) |" in text
    assert "KL from the base 0.0125 (0.01 to 0.015)" in text
    assert "(0.5 to 1), right in 80 % of the pairs" in text
    assert "import palimpsest.tune.adapter" in text and "## Licence" in text
    assert 'from_pretrained("owner/base-2b")' in text


def test_latents_come_from_the_last_step_strongest_first(tmp_path):
    text = body(ModelCard.load(write_card(folder(tmp_path / "a"), RESULT, labels={SITE: {80: "semicolons"}})))
    rows = re.findall(r"^\| `resid_post.13` \| (\d+) \| (\S+) \| (.*)\|$", text, re.M)
    assert [row[:2] for row in rows] == [("80", "-2"), ("8802", "1.25"), ("7", "0.5")]
    assert rows[0][2].strip() == "`semicolons`" and rows[1][2].strip() == ""
    many = folder(tmp_path / "b", values={i: float(i) for i in range(1, 60)})
    text = body(ModelCard.load(write_card(many, RESULT)))
    assert len(re.findall(r"^\| `resid_post.13` \| \d+ \| \S+ \|$", text, re.M)) == 20
    assert "label" not in text.lower().split("## latents")[1].split("##")[0]


def test_a_constant_vector_is_said_to_have_no_numbers_of_its_own(tmp_path):
    made = folder(tmp_path / "a")
    assert "Many sets of numbers" in write_card(made, RESULT | {"method": "bias"}).read_text()
    assert "Many sets of numbers" not in write_card(made, RESULT).read_text()


def test_no_path_of_this_machine_is_shown(tmp_path):
    local = folder(
        tmp_path / "a", base="/home/me/models/base", data=("/data/secret/x.jsonl", "C:\\me\\y.jsonl")
    )
    card = ModelCard.load(write_card(local, RESULT))
    assert card.data.base_model is None
    assert "x.jsonl, y.jsonl" in card.content and 'from_pretrained("base")' in card.content
    for word in ("/home", "/data", "secret", "C:", str(tmp_path)):
        assert word not in card.content


HOSTILE = "x`](http://evil) | <script>alert(1)</script>\n\n# owned\x1b[31m\u202e![i](http://evil/i.png)"


def test_text_of_others_stays_text(tmp_path):
    made = folder(tmp_path / "a", base=HOSTILE, dictionary=HOSTILE, data=(HOSTILE,))
    result = RESULT | {"stopped": HOSTILE, "objective_value": RESULT["objective_value"] | {"unit": HOSTILE}}
    card = ModelCard.load(write_card(made, result, labels={SITE: {80: HOSTILE}}))
    text = card.content
    assert "<script" not in text and "](" not in text and "\x1b" not in text and "\u202e" not in text
    assert not re.search(r"^# owned", text, re.M)
    table = text.split("## Latents that moved most")[1].split("\n\n")[1]
    assert {line.count("|") for line in table.strip().splitlines()} == {5}
    assert card.data.base_model is None


def test_a_card_of_little(tmp_path):
    path = tmp_path / "lora"
    path.mkdir()
    (path / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "r": 8, "base_model_name_or_path": None})
    )
    card = ModelCard.load(write_card(path, {"method": "lora", "margin": None, "general": None}))
    assert "palimpsest.tune" not in card.content and "no latents" in card.content
    assert "None" not in body(card).replace("None is stated", "")


@pytest.mark.parametrize("content", [None, "{", "[]"])
def test_what_is_no_adapter_is_refused(tmp_path, content):
    if content is not None:
        (tmp_path / "adapter_config.json").write_text(content)
    with pytest.raises(ArtifactError, match="holds no adapter"):
        write_card(tmp_path, RESULT)
