"""The reader of examples folders against the tables that were written."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import latents_fixture as fixture
from palimpsest.artifacts import RunFolder
from palimpsest.errors import ArtifactError, ConfigError
from palimpsest.latents import LatentIndex, Query, read_labels, schema
from palimpsest.latents.schema import EXAMPLES, LATENTS


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fixture.make_examples(tmp_path_factory.mktemp("examples") / "run", 900, 10)


@pytest.fixture(scope="module")
def labels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fixture.make_labels(tmp_path_factory.mktemp("labels") / "run", [3, 4, 12])


@pytest.fixture(scope="module")
def index(folder: Path, labels: Path) -> LatentIndex:
    return LatentIndex.open(folder, [labels])


@pytest.fixture(scope="module")
def rows(folder: Path) -> list[dict]:
    return pq.read_table(folder / LATENTS).to_pylist()


def test_every_alive_latent_is_there_and_no_dead_one(index: LatentIndex, rows: list[dict]) -> None:
    assert len(index) == 810 and not (index.latents % 10 == 9).any()
    for row in rows[::97]:
        found = index.row(row["latent"])
        assert {key: found[key] for key in row} == row


@pytest.mark.parametrize("latent", [9, 899, 900, -1, 10**9])
def test_a_dead_latent_has_no_row_and_no_examples(index: LatentIndex, latent: int) -> None:
    with pytest.raises(ConfigError, match="alive"):
        index.row(latent)
    assert index.examples(latent) == []


def test_examples_are_those_of_the_table(index: LatentIndex, folder: Path) -> None:
    table = pq.read_table(folder / EXAMPLES).to_pylist()
    assert pq.ParquetFile(folder / EXAMPLES).metadata.num_row_groups > 1
    texts = fixture.vocabulary()
    for latent in (0, 1, 408, 409, 410, 898):
        expected = [row for row in table if row["latent"] == latent]
        found = index.examples(latent)
        assert len(found) == len(expected)
        for one, row in zip(found, expected, strict=True):
            assert one.tokens == [texts[i] for i in row["ids"]] and one.ids == row["ids"]
            assert (one.kind, one.rank, one.peak) == (row["kind"], row["rank"], row["peak"])
            assert one.corpus == fixture.CORPORA[row["corpus"]]
            assert one.value == row["value"] and one.base == row["base_value"]
            dense = np.zeros(len(row["ids"]))
            dense[row["at"]] = row["tuned_at"]
            assert one.tuned_at == dense.tolist() and one.tuned_at[one.peak] == one.tuned
    assert {one.kind for one in index.examples(0, kind=0)} == {0}
    assert len(index.examples(0, limit=3)) == 3


def test_a_signal_that_does_not_exist_is_none(tmp_path: Path) -> None:
    index = LatentIndex.open(fixture.make_examples(tmp_path / "diff", 20, 5, kind="diff"))
    (one, *_) = index.examples(0)
    assert one.base is None and one.base_at is None and one.tuned_at is None and max(one.value_at) > 0
    assert index.row(0)["rate_base"] is None
    # Nothing to sort or filter by: no error, nothing invented.
    assert index.search(Query(where=(("rate_base", ">=", 0),))).total == 0
    assert len(index.search(Query(sort="rate_base")).rows) == 18


@pytest.mark.parametrize("descending", [False, True])
@pytest.mark.parametrize("column", ["rate", "latent", "rate[math]", "label_score"])
def test_sorting_agrees_with_python_and_puts_what_is_missing_last(
    index: LatentIndex, rows: list[dict], column: str, descending: bool
) -> None:
    found = index.search(Query(sort=column, descending=descending, limit=10_000)).rows
    values = [row[column] for row in found]
    known = [value for value in values if value is not None]
    assert known == sorted(known, reverse=descending) and values[: len(known)] == known
    assert len(found) == len(rows)


def test_filters_and_paging_agree_with_python(index: LatentIndex, rows: list[dict]) -> None:
    where = (("rate", ">", 0.01), ("rate_base", "<=", 0.02))
    expected = [r["latent"] for r in rows if r["rate"] > 0.01 and r["rate_base"] <= 0.02]
    assert 10 < len(expected) < len(rows)
    pages = [index.search(Query(where=where, offset=start, limit=7)) for start in range(0, len(expected), 7)]
    assert [row["latent"] for page in pages for row in page.rows] == expected
    assert {page.total for page in pages} == {len(expected)}
    assert index.search(Query(offset=10**6)).rows == [] and index.search(Query(limit=0)).rows == []


def test_text_finds_numbers_labels_and_tokens_whatever_their_case(
    index: LatentIndex, rows: list[dict]
) -> None:
    assert [row["latent"] for row in index.search(Query("42")).rows] == [42]
    assert [row["latent"] for row in index.search(Query("NUMBERS in")).rows] == [3, 4, 12]
    said = [
        r["latent"]
        for r in rows
        if any("RIVER".lower() in t for k in ("tokens", "promoted_base", "promoted_tuned") for t in r[k])
    ]
    assert 0 < len(said) < len(rows)
    assert [row["latent"] for row in index.search(Query("River", limit=10_000)).rows] == said
    assert index.search(Query("%")).total == index.search(Query(".*")).total == 0
    assert index.search(Query("x" * 100_000)).total == 0


def test_labels_come_with_scores_and_the_better_one_wins(
    index: LatentIndex, folder: Path, tmp_path: Path
) -> None:
    row = index.row(3)
    assert row["label"] == "numbers in sums 3" and row["label_provider"] == "tokens"
    assert row["label_score"] == pytest.approx(0.9)
    assert index.row(5)["label"] is None
    scored = fixture.make_labels(tmp_path / "scored", [3], hostile=True)
    unscored = fixture.make_labels(tmp_path / "unscored", [3], scored=False)
    for order in ([scored, unscored], [unscored, scored]):
        assert LatentIndex.open(folder, order).row(3)["label_score"] == pytest.approx(0.9)


@pytest.mark.parametrize(
    "query", [Query(sort="secret"), Query(where=(("secret", ">", 0),)), Query(where=(("rate", "~", 0),))]
)
def test_unknown_columns_and_operators_are_refused(index: LatentIndex, query: Query) -> None:
    with pytest.raises(ConfigError):
        index.search(query)


def test_folders_that_are_no_examples_are_refused(folder: Path, labels: Path, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="another verb"):
        LatentIndex.open(labels)
    with pytest.raises(ArtifactError, match="another verb"):
        LatentIndex.open(folder, [folder])
    with RunFolder(tmp_path / "begun", stage="examples", config={}, inputs={}):
        pass
    with pytest.raises(ArtifactError, match="not finished"):
        LatentIndex.open(tmp_path / "begun")
    with RunFolder(tmp_path / "empty", stage="examples", config={}, inputs={}) as run:
        run.finish()
    with pytest.raises(ArtifactError, match=r"holds no examples\.json"):
        LatentIndex.open(tmp_path / "empty")


def test_labels_of_another_dictionary_are_left_out(folder: Path, tmp_path: Path, caplog) -> None:
    other = tmp_path / "other"
    about = {"schema": 1, "dictionary": {"path": "other", "sha256": "1" * 64}}
    row = {"latent": 3, "label": "of another", "provider": "tokens"}
    table = pa.Table.from_pylist([row], schema=schema.label_schema())
    with RunFolder(other, stage="labels", config={}, inputs={}) as run:
        run.write_json("labels.json", about)
        run.write_table("labels.parquet", table)
        run.finish()
    with caplog.at_level("WARNING", logger="palimpsest"):
        index = LatentIndex.open(folder, [other])
    assert index.row(3)["label"] is None
    assert read_labels([other])[3].text == "of another"


def test_examples_that_have_gone_or_are_damaged_are_an_error_of_ours(tmp_path: Path) -> None:
    gone, damaged = (fixture.make_examples(tmp_path / name, 20) for name in ("gone", "damaged"))
    index = LatentIndex.open(gone)
    shutil.rmtree(gone)
    with pytest.raises(ArtifactError, match="cannot be read"):
        index.examples(3)
    (damaged / "examples.parquet").write_bytes(b"junk")
    with pytest.raises(ArtifactError, match="cannot be read"):
        LatentIndex.open(damaged).examples(3)


def test_half_a_surrogate_pair_is_found_nowhere(index: LatentIndex) -> None:
    assert index.search(Query("\ud800")).total == 0


def test_token_ids_may_be_as_large_as_they_like(tmp_path: Path) -> None:
    from palimpsest.latents.example_file import ExampleFile

    vocab = pa.table({"id": [3, 2**31 - 1, 5], "text": ["three", "last", None]}, schema=schema.vocab_schema())
    assert ExampleFile(tmp_path, [], vocab).text([2**31 - 1, 3, 5, -1]) == ["last", "three", "⟨5⟩", "⟨-1⟩"]
