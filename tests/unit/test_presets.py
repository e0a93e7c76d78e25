"""Battery presets: the shipped ones parse, and rows of the published layouts become conversations."""

import json
from dataclasses import replace
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from helpers import python_source
from palimpsest.audit.battery import presets
from palimpsest.audit.battery.presets import FACTS, Preset, list_presets, load_preset, materialise
from palimpsest.corpus import read_rows
from palimpsest.corpus.rows import HubId, parse_source
from palimpsest.errors import ConfigError, CorpusError

ROWS = {
    "general": [
        {"instruction": "Name a fruit.", "input": "", "output": "Pear.", "text": "Below is an instruction"},
        {"instruction": "Add them.", "input": "2 and 3", "output": "5", "text": "Below is an instruction"},
    ],
    "safety": [{"prompt": "How are locks made?", "response": "With care.", "severity_category": 0}],
    "math": [{"question": "What is 2 + 3?", "answer": "2 + 3 = <<2+3=5>>5\n#### 5"}],
    "reasoning": [{"INSTRUCTION": "p implies q, and p.", "RESPONSE": "Hence q.", "SOURCE": "LogicInference"}],
    "empathy": [
        {
            "conv_id": "hit:0_conv:1",
            "situation": "A lost cat",
            "emotion": "sad",
            "conversations": [
                {"content": "My cat is gone.", "role": "user"},
                {"content": "I am sorry.", "role": "assistant"},
            ],
        }
    ],
    "chinese": [{"instruction": "翻译", "input": "pear", "output": "梨"}],
}
"""Rows in the layout that each data set of the preset `original` publishes."""


def turns(*contents: str) -> dict:
    roles = ("user", "assistant")
    return {"messages": [{"role": role, "content": text} for role, text in zip(roles, contents, strict=True)]}


WRITTEN = {
    "general": [turns("Name a fruit.", "Pear."), turns("Add them.\n2 and 3", "5")],
    "safety": [turns("How are locks made?", "With care.")],
    "math": [turns("What is 2 + 3?", "2 + 3 = <<2+3=5>>5\n#### 5")],
    "reasoning": [turns("p implies q, and p.", "Hence q.")],
    "empathy": [turns("My cat is gone.", "I am sorry.")],
    "chinese": [turns("翻译\npear", "梨")],
}


def as_jsonl(path: Path, rows: list[dict]) -> Path:
    path = path.with_suffix(".jsonl")
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def as_parquet(path: Path, rows: list[dict]) -> Path:
    path = path.with_suffix(".parquet")
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def as_saved(path: Path, rows: list[dict]) -> Path:
    datasets.DatasetDict({"train": datasets.Dataset.from_list(rows)}).save_to_disk(path)
    return path


def local(folder: Path, rows: dict[str, list[dict]], write=as_jsonl) -> Preset:
    """The preset `original` with its sources replaced by files, and only the corpora that have rows."""
    preset = load_preset("original")
    kept = [corpus for corpus in preset.corpora if corpus.name in rows]
    sources = [str(write(folder / f"{corpus.name}-source", rows[corpus.name])) for corpus in kept]
    corpora = [replace(corpus, source=source) for corpus, source in zip(kept, sources, strict=True)]
    return replace(preset, corpora=tuple(corpora))


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def toml(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    return str(path)


SMALL = """
documents = 5
[general]
source = "a.jsonl"
licence = "mit"
text = "text"
[tasks.poems]
source = "b.jsonl"
licence = "mit"
user = ["title"]
assistant = "poem"
"""


@pytest.mark.parametrize("name", list_presets())
def test_every_shipped_preset_parses(name):
    preset = load_preset(name)
    assert [corpus.role for corpus in preset.corpora] == ["general"] + ["task"] * (len(preset.corpora) - 1)
    for corpus in preset.corpora:
        assert isinstance(parse_source(corpus.source), HubId)
        assert corpus.note and corpus.licence
        assert set(corpus.checked) | set(corpus.unchecked) == set(FACTS)
        assert all(page.startswith("https://") for page in corpus.checked.values())


def test_the_original_has_its_six_corpora():
    preset = load_preset("original")
    assert [corpus.name for corpus in preset.corpora] == list(ROWS)
    assert {(corpus.documents, corpus.answer_chars) for corpus in preset.corpora} == {(700, 100)}
    assert preset.corpora[0].source == "tatsu-lab/alpaca"
    assert preset.corpora[1].unchecked == ("format", "licence")


@pytest.mark.parametrize("write", [as_jsonl, as_parquet, as_saved])
def test_rows_of_the_published_layout_become_conversations(tmp_path, write):
    files = materialise(local(tmp_path, ROWS, write), tmp_path / "out")
    assert list(files) == list(ROWS)
    assert {name: lines(path) for name, path in files.items()} == WRITTEN
    row = next(iter(read_rows(files["empathy"])))
    assert row.messages is not None
    assert [one["role"] for one in row.messages] == ["user", "assistant"]


def test_plain_text_is_written_as_text(tmp_path):
    preset = load_preset(toml(tmp_path / "mine.toml", SMALL))
    assert (preset.name, [corpus.documents for corpus in preset.corpora]) == ("mine", [5, 5])
    source = as_jsonl(tmp_path / "a", [{"text": "  one\ud800"}, {"text": "\n"}])
    preset = replace(preset, corpora=(replace(preset.corpora[0], source=str(source)),))
    assert lines(materialise(preset, tmp_path / "out")["general"]) == [{"text": "  one\ud800"}]


def test_blank_rows_are_left_out_and_counted(tmp_path):
    general = [
        {"instruction": " ", "input": "x", "output": "y"},
        {"instruction": "a", "output": "b"},
        {"instruction": "a", "input": None, "output": None},
        {"instruction": "a", "input": None, "output": "c"},
    ]
    empathy = [
        {"conversations": []},
        {"conversations": None},
        {"conversations": [{"role": "user", "content": "\n"}]},
        *ROWS["empathy"],
    ]
    skipped: dict[str, int] = {}
    preset = local(tmp_path, {"general": general, "empathy": empathy})
    files = materialise(preset, tmp_path / "out", skipped=skipped)
    assert lines(files["general"]) == [turns("a", "b"), turns("a", "c")]
    assert lines(files["empathy"]) == WRITTEN["empathy"]
    assert skipped == {"general": 2, "empathy": 3}


def test_the_limit_counts_written_rows_and_stops_reading(tmp_path):
    rows = [{"question": " ", "answer": "x"}, *({"question": f"q{i}", "answer": f"a{i}"} for i in range(3))]
    source = local(tmp_path, {"math": rows})
    with Path(source.corpora[0].source).open("a", encoding="utf-8") as handle:
        handle.write("no json\n")
    assert lines(materialise(source, tmp_path / "out", limit=2)["math"]) == [
        turns("q0", "a0"),
        turns("q1", "a1"),
    ]
    with pytest.raises(CorpusError, match="corpus math of preset original.*no valid JSON"):
        materialise(source, tmp_path / "out", limit=4)
    with pytest.raises(ConfigError, match="at least 1"):
        materialise(source, tmp_path / "out", limit=0)


@pytest.mark.parametrize(
    ("name", "row", "found"),
    [
        ("math", {"question": "q", "solution": "a"}, "no field 'answer'.*question, solution"),
        ("general", {"input": "x", "output": "a"}, "no field 'instruction'"),
        ("math", {"question": "q", "answer": 5}, "field 'answer' of another type.*int"),
        ("empathy", {"turns": []}, "no field 'conversations'"),
        ("empathy", {"conversations": "hello"}, "field 'conversations' of another type.*str"),
        ("empathy", {"conversations": ["hello"]}, "message in 'conversations' that is no object.*str"),
        ("empathy", {"conversations": [{"from": "human", "value": "a"}]}, "no field 'role'.*from, value"),
    ],
)
def test_a_row_without_its_field_names_the_entry_and_leaves_no_file(tmp_path, name, row, found):
    preset = local(tmp_path, {name: [*ROWS[name], row]})
    with pytest.raises(CorpusError, match=f"corpus {name} of preset original.*{found}"):
        materialise(preset, tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_a_failure_leaves_an_earlier_file_as_it_was(tmp_path):
    files = materialise(local(tmp_path, {"math": ROWS["math"]}), tmp_path / "out")
    with pytest.raises(CorpusError):
        materialise(local(tmp_path, {"math": [*ROWS["math"], {}]}), tmp_path / "out")
    assert lines(files["math"]) == WRITTEN["math"]


@pytest.mark.parametrize("rows", [[], [{"question": "", "answer": "a"}]])
def test_a_corpus_without_text_is_refused(tmp_path, rows):
    with pytest.raises(CorpusError, match=f"math of preset original has no row with text.*{len(rows)} rows"):
        materialise(local(tmp_path, {"math": rows}), tmp_path / "out")


def test_a_source_that_is_not_there_or_of_no_kind_is_refused(tmp_path):
    corpus = load_preset("original").corpora[2]
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "folder").mkdir()
    for source, problem in {"none.jsonl": "does not exist", "a.txt": "rows of", "folder": "rows of"}.items():
        preset = Preset("mine", "", (replace(corpus, source=str(tmp_path / source)),))
        with pytest.raises(CorpusError, match=f"corpus math of preset mine.*{problem}"):
            materialise(preset, tmp_path / "out")


def test_a_hub_set_is_streamed_and_runs_no_code_of_its_own(tmp_path, monkeypatch):
    calls = []

    def load(*args, **options):
        calls.append((args, options))
        return iter(ROWS["math"] * 3)

    monkeypatch.setattr(datasets, "load_dataset", load)
    preset = load_preset("original")
    preset = replace(preset, corpora=(replace(preset.corpora[2], source="openai/gsm8k:main@abc"),))
    assert lines(materialise(preset, tmp_path, limit=2)["math"]) == WRITTEN["math"] * 2
    assert calls == [
        (("openai/gsm8k", "main"), {"revision": "abc", "split": "train", "streaming": True}),
    ]


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ("documents = 5", "documents = 0", "'documents'.*positive whole number.*0"),
        ("documents = 5", "documents = true", "'documents'.*positive whole number"),
        ("documents = 5", "", "general of preset mine lacks documents"),
        ("documents = 5", "documnets = 5", "cannot have.*documnets"),
        ('text = "text"', 'text = "text"\nlicense = "mit"', "general.*cannot have.*license"),
        ('text = "text"', 'text = "text"\nname = "x"', "cannot have.*name"),
        ('text = "text"', 'text = ""', "'text' of another type"),
        ('text = "text"', "", "how a row is read.*none of them"),
        ('text = "text"', 'text = "text"\nmessages = "m"', "how a row is read.*messages and text"),
        ('assistant = "poem"', "", "poems.*how a row is read.*user"),
        ('user = ["title"]', "", "how a row is read.*assistant"),
        ('user = ["title"]', 'user = "title"', "'user'.*list of field names"),
        ('user = ["title"]', 'user = ["title"]\noptional = ["tilte"]', "optional fields.*tilte"),
        ('user = ["title"]', 'user = ["title"]\noptional = ["title"]', "optional fields.*not all"),
        ('user = ["title"]', 'user = ["title"]\nchecked = {colour = "x"}', "'checked'.*colour"),
        ("[tasks.poems]", '[tasks."a/b"]', "no file name.*a/b"),
        ("[tasks.poems]", "[tasks.general]", "no battery"),
        ("[tasks.poems]", "[poems]", "cannot have.*poems"),
        ("[general]", "[general", "Cannot parse"),
    ],
)
def test_a_preset_that_makes_no_sense_is_refused(tmp_path, old, new, problem):
    assert old in SMALL
    with pytest.raises(ConfigError, match=problem):
        load_preset(toml(tmp_path / "mine.toml", SMALL.replace(old, new)))


def test_an_unknown_preset_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="no preset 'origin'.*original"):
        load_preset("origin")
    with pytest.raises(ConfigError, match="Cannot read the preset"):
        load_preset(str(tmp_path / "none.toml"))


def test_presets_are_listed_and_loaded_without_torch():
    code = f"import sys, {presets.__name__} as p; p.load_preset(p.list_presets()[0]); print('torch' in sys.modules)"
    assert python_source(code).stdout == "False\n"
