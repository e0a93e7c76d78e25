"""Bad input: each error names the place, and skipping counts."""

import gzip
import json
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from huggingface_hub import HfApi
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from palimpsest.corpus import Corpus, CorpusStats, read_rows
from palimpsest.errors import ConfigError, CorpusError
from palimpsest.hub import hub_errors

ALPHABET = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}


def make_tokenizer(template: str | None = None, **named: str) -> PreTrainedTokenizerFast:
    inner = Tokenizer(models.BPE(vocab=ALPHABET, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<eos>", **named)
    tokenizer.chat_template = template
    return tokenizer


def write(path: Path, *lines: str | bytes) -> Path:
    path.write_bytes(b"".join((line.encode() if isinstance(line, str) else line) + b"\n" for line in lines))
    return path


def fails(source, **options) -> str:
    with pytest.raises(CorpusError) as caught:
        list(read_rows(source, **options))
    return str(caught.value)


FINE = '{"text": "fine"}'
BAD_LINES = {
    "json": ('{"text": "no end', "valid JSON"),
    "array row": ("[1, 2]", "no object"),
    "number": ("42", "a number"),
    "null": ("null", "null"),
    "other fields": ('{"prompt": "p", "chosen": "c"}', "prompt, chosen"),
    "empty object": ("{}", "empty object"),
    "null text": ('{"text": null}', "holds no text"),
    "number as text": ('{"text": 7}', "a number"),
    "list as text": ('{"text": ["a"]}', "a list"),
    "messages as text": ('{"messages": "hi"}', "a string"),
    "no messages": ('{"messages": []}', "at least one"),
    "message as text": ('{"messages": ["hi"]}', "role and content"),
    "no role": ('{"messages": [{"from": "human", "value": "hi"}]}', "from, value"),
    "unknown role": ('{"messages": [{"role": "wizard", "content": "hi"}]}', "wizard"),
    "no content": ('{"messages": [{"role": "user"}]}', "user message without text"),
    "number as content": ('{"messages": [{"role": "user", "content": 1}]}', "a number"),
    "image": ('{"messages": [{"role": "user", "content": [{"type": "image"}]}]}', "text parts"),
    "nested too deep": ("[" * 100_000 + "]" * 100_000, "valid JSON"),
    "not utf-8": (b'{"text": "caf\xe9"}', "UTF-8"),
}


@pytest.mark.parametrize("case", BAD_LINES)
def test_a_bad_line_is_named_and_counted_when_skipped(tmp_path, case):
    line, words = BAD_LINES[case]
    path = write(tmp_path / "a.jsonl", FINE, "", line, FINE)
    message = fails(path)
    assert f"{path}:3" in message
    assert words in message
    assert "--skip-bad-rows" in message
    stats = CorpusStats()
    assert [row.text for row in read_rows(path, skip_bad_rows=True, stats=stats)] == ["fine", "fine"]
    assert stats.bad_rows == 1


def test_missing_paths_are_told_from_hub_ids(tmp_path):
    for missing in (
        tmp_path / "a.jsonl",
        str(tmp_path / "none"),
        "owner/rows.jsonl",
        "rows.jsonl",
        "no such",
    ):
        assert "does not exist" in fails(missing)


def test_empty_and_unknown_files_are_refused(tmp_path):
    assert "is empty" in fails(write(tmp_path / "a.jsonl"))
    assert ".csv" in fails(write(tmp_path / "a.csv", "text", "hi"))
    (tmp_path / "folder").mkdir()
    assert "an empty folder" in fails(tmp_path / "folder")
    write(tmp_path / "folder" / "notes.pdf", "x")
    assert "notes.pdf" in fails(tmp_path / "folder")


def test_a_json_array_is_told_how_to_become_lines(tmp_path):
    assert "jq" in fails(write(tmp_path / "a.json", "[", ' {"text": "a"}', "]"), skip_bad_rows=True)


def test_a_truncated_gzip_is_refused_by_name(tmp_path):
    whole = gzip.compress((FINE + "\n").encode() * 5000)
    (tmp_path / "a.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "b.jsonl.gz").write_bytes(b"no gzip at all")
    assert "a.jsonl.gz cannot be read" in fails(tmp_path / "a.jsonl.gz")
    assert "b.jsonl.gz cannot be read" in fails(tmp_path / "b.jsonl.gz")


def test_a_text_file_in_another_encoding_names_the_line(tmp_path):
    path = write(tmp_path / "a.txt", "one", b"two \xff", "three")
    assert f"{path}:2" in fails(path)
    stats = CorpusStats()
    assert list(read_rows(path, skip_bad_rows=True, stats=stats)) == []
    assert stats.bad_rows == 1


def test_parquet_errors_name_columns_rows_and_files(tmp_path):
    pq.write_table(pa.table({"body": ["a"], "id": [1]}), tmp_path / "a.parquet")
    assert "body, id" in fails(tmp_path / "a.parquet")
    pq.write_table(pa.table({"text": ["a", None, "c"]}), tmp_path / "b.parquet")
    assert "row 2" in fails(tmp_path / "b.parquet")
    write(tmp_path / "c.parquet", "no parquet")
    assert "c.parquet" in fails(tmp_path / "c.parquet")
    invalid = pa.StringArray.from_buffers(2, *pa.array([b"fine", b"\xff\xfe"]).buffers()[1:])
    pq.write_table(pa.table({"text": invalid}), tmp_path / "d.parquet")
    assert "row 2" in fails(tmp_path / "d.parquet")


def test_saved_dataset_errors(tmp_path):
    one = datasets.Dataset.from_dict({"text": ["x"]})
    datasets.DatasetDict({"train": one, "test": one}).save_to_disk(str(tmp_path / "both"))
    message = fails(tmp_path / "both", split="validation")
    assert "train, test" in message and "--split" in message
    (tmp_path / "broken").mkdir()
    write(tmp_path / "broken" / "state.json", "{}")
    assert "saved data set" in fails(tmp_path / "broken")


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (ConnectionError("Couldn't reach 'owner/name' on the Hub"), "Go online"),
        (FileNotFoundError("Dataset 'owner/name' doesn't exist"), "Check the name"),
        (ValueError("Bad split: train"), "split"),
    ],
)
def test_hub_errors_say_what_to_do(monkeypatch, error, words):
    def refuse(*args, **kwargs):
        raise error

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    message = fails("owner/name:config@main")
    assert "owner/name" in message and words in message


def test_a_fingerprint_without_a_network_keeps_the_revision_asked_for(monkeypatch):
    transport = hub_errors()[-1]  # the HTTP library's own, where it is no OSError

    def refuse(*args, **kwargs):
        raise transport("no network")

    monkeypatch.setattr(HfApi, "dataset_info", refuse)
    entry = Corpus("owner/name:part@v1.0", make_tokenizer()).fingerprint()
    assert entry == {"path": "owner/name:part", "revision": "v1.0", "sha256": None}


def test_hub_ids_carry_config_revision_and_split(monkeypatch):
    seen = {}

    def load(name, config, **kwargs):
        seen.update(kwargs, name=name, config=config)
        return iter([{"text": "from the hub"}])

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert [row.text for row in read_rows("owner/name:part@v1.0", split="test")] == ["from the hub"]
    assert seen == {
        "name": "owner/name",
        "config": "part",
        "revision": "v1.0",
        "split": "test",
        "streaming": True,
    }
    assert Corpus("owner/name:part", make_tokenizer()).name == "name-part"


def test_a_corpus_without_a_document_is_refused_with_the_counts(tmp_path):
    path = write(tmp_path / "a.jsonl", '{"text": ""}', "{bad")
    with pytest.raises(CorpusError, match="1 empty and 1 unreadable"):
        list(Corpus(path, make_tokenizer(), skip_bad_rows=True).documents())
    with pytest.raises(CorpusError, match="no rows with text"):
        list(Corpus(path, make_tokenizer(), skip_bad_rows=True).blocks(8, epochs=None))
    blank = write(tmp_path / "b.jsonl", "", "")
    with pytest.raises(CorpusError, match="no rows with text"):
        next(Corpus(blank, make_tokenizer()).batches())


def test_a_corpus_without_a_token_of_the_roles_is_refused(tmp_path):
    path = write(tmp_path / "a.jsonl", FINE)
    with pytest.raises(CorpusError, match="roles assistant"):
        list(Corpus(path, make_tokenizer(), roles=("assistant",)).batches())


def test_conversations_need_a_template_and_offsets(tmp_path):
    path = write(tmp_path / "a.jsonl", json.dumps({"messages": [{"role": "user", "content": "hi"}]}))
    with pytest.raises(CorpusError, match="no chat template"):
        list(Corpus(path, make_tokenizer()).documents())

    class Slow:
        bos_token_id = eos_token_id = pad_token_id = None
        all_special_ids = ()
        is_fast = False
        chat_template = "{{ messages[0]['content'] }}"

    with pytest.raises(CorpusError, match="offsets.*Slow"):
        list(Corpus(path, Slow()).documents())


def test_a_conversation_that_the_template_refuses_is_a_bad_row(tmp_path):
    refusal = "{% if messages[0]['role'] != 'user' %}{{ raise_exception('user first') }}{% endif %}"
    strict = refusal + "{{ messages[0]['content'] }}"
    rows = [json.dumps({"messages": [{"role": role, "content": "hi"}]}) for role in ("assistant", "user")]
    path = write(tmp_path / "a.jsonl", *rows)
    with pytest.raises(CorpusError, match="a.jsonl:1 .*user first"):
        list(Corpus(path, make_tokenizer(strict)).documents())
    corpus = Corpus(path, make_tokenizer(strict), skip_bad_rows=True)
    assert len(list(corpus.documents())) == 1
    assert corpus.stats.bad_rows == 1


def test_options_that_make_no_sense_are_refused(tmp_path):
    path = write(tmp_path / "a.jsonl", FINE)
    tokenizer = make_tokenizer()
    for options in (
        {"max_length": 1},
        {"max_documents": 0},
        {"answer_chars": 0},
        {"roles": ("author",)},
        {"roles": ()},
    ):
        with pytest.raises(ConfigError):
            Corpus(path, tokenizer, **options)
    with pytest.raises(ConfigError, match="tokens_per_batch"):
        next(Corpus(path, tokenizer).batches(tokens_per_batch=0))
    with pytest.raises(ConfigError, match="block_length"):
        next(Corpus(path, tokenizer).blocks(0))
    with pytest.raises(CorpusError, match="no BOS"):
        next(Corpus(path, tokenizer, prepend_bos=True).documents())
    with pytest.raises(CorpusError, match="needs a source"):
        Corpus([], tokenizer)
