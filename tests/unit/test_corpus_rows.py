"""Rows from every kind of source, in order and streamed."""

import gzip
import json
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from palimpsest.corpus import CorpusStats, read_rows


def write_lines(path: Path, rows: list) -> Path:
    text = "".join(json.dumps(row) + "\n" for row in rows)
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text, encoding="utf-8")
    return path


def texts_of(source, **options) -> list[str | None]:
    return [row.text for row in read_rows(source, **options)]


def chat(*turns: tuple[str, str]) -> dict:
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.json", "a.ndjson"])
def test_line_files_give_their_rows_in_order(tmp_path, name):
    path = write_lines(tmp_path / name, [{"text": f"row {i}"} for i in range(5)])
    assert texts_of(path) == [f"row {i}" for i in range(5)]


def test_empty_lines_and_a_byte_order_mark_are_no_rows(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "one"}\n\n   \r\n{"text": "two"}\r\n\n')
    stats = CorpusStats()
    assert texts_of(path, stats=stats) == ["one", "two"]
    assert stats.bad_rows == 0


def test_a_unicode_line_separator_does_not_split_a_row(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a\u2028b\u0085c"}\n', encoding="utf-8")
    assert texts_of(path) == ["a\u2028b\u0085c"]


def test_a_text_file_is_one_document_whatever_it_holds(tmp_path):
    (tmp_path / "a.md").write_text("# One\n---\n\ntwo\n", encoding="utf-8")
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(b"three"))
    assert texts_of(tmp_path) == ["# One\n---\n\ntwo\n", "three"]


def test_a_folder_is_read_sorted_with_subfolders_and_without_strangers(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / ".hidden").mkdir()
    write_lines(tmp_path / "b.jsonl", [{"text": "b"}])
    write_lines(tmp_path / "a.jsonl.gz", [{"text": "a"}])
    write_lines(tmp_path / "sub" / "c.jsonl", [{"text": "c"}])
    write_lines(tmp_path / ".hidden" / "d.jsonl", [{"text": "d"}])
    for stranger in ("weights.bin", "README.md", "LICENSE.txt"):
        (tmp_path / stranger).write_text("no row")
    assert texts_of(tmp_path) == ["a", "b", "c"]


def test_parquet_gives_text_and_messages(tmp_path):
    conversation = chat(("user", "hi"), ("assistant", "hello"))["messages"]
    table = pa.table({"text": ["plain", None], "messages": [None, conversation], "other": [1, 2]})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=1)
    rows = list(read_rows(tmp_path / "a.parquet"))
    assert rows[0].text == "plain"
    assert [(m["role"], m["content"]) for m in rows[1].messages] == [("user", "hi"), ("assistant", "hello")]


def test_a_saved_dataset_is_recognised_and_its_split_chosen(tmp_path):
    one = datasets.Dataset.from_dict({"text": ["x", "y"]})
    two = datasets.Dataset.from_list([chat(("user", "q"), ("assistant", "a"))])
    one.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict({"train": one, "test": two}).save_to_disk(str(tmp_path / "both"))
    assert texts_of(tmp_path / "one") == ["x", "y"]
    assert texts_of(tmp_path / "both") == ["x", "y"]
    (row,) = read_rows(tmp_path / "both", split="test")
    assert [m["content"] for m in row.messages] == ["q", "a"]


def test_several_sources_take_turns(tmp_path):
    a = write_lines(tmp_path / "a.jsonl", [{"text": f"a{i}"} for i in range(3)])
    b = write_lines(tmp_path / "b.jsonl", [{"text": "b0"}])
    assert texts_of([a, b]) == ["a0", "b0", "a1", "a2"]


def test_a_row_with_both_fields_is_read_as_a_conversation(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", [{"text": "rendered"} | chat(("user", "hi"))])
    assert next(read_rows(path)).messages is not None
    assert texts_of(path, messages_field="") == ["rendered"]


def test_rows_are_streamed(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "fine"}\n{broken\n')
    rows = read_rows(path)
    assert next(rows).text == "fine"
