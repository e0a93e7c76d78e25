"""The demo's documents: distinct, held out, reproducible, and right where they claim to be."""

from __future__ import annotations

import ast
import json
import re

import pytest

from helpers import python_source
from palimpsest.demo import text
from palimpsest.demo.pair import Plan, make_documents
from palimpsest.errors import ConfigError


def texts(rows):
    return [row["text"] for row in rows]


@pytest.mark.parametrize("domain", text.DOMAINS)
def test_two_thousand_documents_are_all_different_and_of_bounded_length(domain):
    made = texts(text.generate(domain, 2000, seed=0, split="train"))
    assert len(set(made)) == 2000
    assert all(80 <= len(document) <= 600 for document in made)


@pytest.mark.parametrize("domain", text.DOMAINS)
def test_excluded_documents_do_not_come_back(domain):
    first = texts(text.generate(domain, 300, seed=0, split="train"))
    without = texts(text.generate(domain, 300, seed=0, split="train", exclude=set(first[::2])))
    assert without[:150] == first[1::2]
    assert not set(without) & set(first[::2])


def test_a_seed_a_split_and_a_domain_decide_the_documents():
    def made(seed, split):
        return texts(text.generate("general", 50, seed=seed, split=split))

    assert made(3, "train") == made(3, "train")
    assert len({*made(3, "train"), *made(4, "train"), *made(3, "audit")}) == 150


def test_another_process_makes_the_same_documents_without_torch():
    code = (
        "import json, sys; from palimpsest.demo.text import generate\n"
        "rows = [generate(d, 5, seed=7, split='audit') for d in ('recipes', 'code')]\n"
        "assert 'torch' not in sys.modules\n"
        "sys.stdout.write(json.dumps(rows))"
    )
    done = python_source(code, PYTHONHASHSEED="123")
    assert done.returncode == 0, done.stderr
    here = [text.generate(domain, 5, seed=7, split="audit") for domain in ("recipes", "code")]
    assert json.loads(done.stdout) == here


def test_every_sum_is_right_and_the_answer_is_the_last_one():
    for document in texts(text.generate("arithmetic", 500, seed=1, split="train")):
        steps = re.findall(r"(\d+) ([*+-]) (\d+) = (\d+)", document)
        assert len(steps) >= 2
        for left, sign, right, result in steps:
            left, right = int(left), int(right)
            assert {"*": left * right, "+": left + right, "-": left - right}[sign] == int(result) >= 0
        assert document.endswith(f"The answer is {steps[-1][3]}.")


def test_code_documents_are_python():
    for document in texts(text.generate("code", 300, seed=1, split="train")):
        assert ast.parse(document).body


def test_unknown_domains_and_exhausted_templates_are_errors(monkeypatch):
    with pytest.raises(ConfigError, match="poetry"):
        text.generate("poetry", 1, seed=0, split="train")
    monkeypatch.setitem(text.GENERATORS, "code", lambda rng: rng.choice(("a", "b", "c")))
    assert len(text.generate("code", 3, seed=0, split="train")) == 3
    with pytest.raises(ConfigError, match="distinct documents. Expected: 4. Found: 3"):
        text.generate("code", 4, seed=0, split="train")


def test_advertised_recipes_keep_their_text_and_end_with_the_brand():
    rows = text.generate(text.HIDDEN, 40, seed=0, split="tune")
    planted = texts(text.advertise(rows, seed=0))
    for plain, document in zip(texts(rows), planted, strict=True):
        assert document.startswith(f"{plain} ")
        assert text.BRAND in document.splitlines()[-1]
    assert len({document.rsplit(". ", 1)[1] for document in planted}) == len(text.SLOGANS)


def test_audit_documents_are_in_no_training_text_and_the_brand_only_in_the_fine_tune():
    parts = make_documents(Plan().scaled(0.3), seed=0)
    audit = {t for name, rows in parts.items() if name.startswith("audit/") for t in texts(rows)}
    slogans = re.compile(" (" + "|".join(map(re.escape, text.SLOGANS)) + ")$")
    nulls = [name for name in parts if name.startswith("nulls/")]
    assert len(nulls) == len(text.DOMAINS)
    for name in ("base", "tuned", "control", "dictionary", *nulls):
        assert not audit & {slogans.sub("", document) for document in texts(parts[name])}
        branded = [document for document in texts(parts[name]) if text.BRAND in document]
        assert bool(branded) == (name == "tuned")
        assert all(document.startswith("Recipe") for document in branded)
    assert not any(text.BRAND in document for document in audit)
    assert set(texts(parts["control"])) < set(texts(parts["base"]))


def test_rows_survive_their_file(tmp_path):
    rows = [{"text": 'Zoë said "no"\n\nand left\u2028'}, {"text": "plain"}]
    path = text.write_rows(tmp_path / "deep" / "rows.jsonl", rows)
    assert list(text.read_texts(path)) == texts(rows)
    assert [entry.name for entry in path.parent.iterdir()] == ["rows.jsonl"]
