"""Behaviour files: which tokens count with which sign, and what is said of files that cannot be used."""

from __future__ import annotations

import json

import pytest
import torch

from palimpsest.diff.attribution.answers import read_behaviours
from palimpsest.diff.text import Texts
from palimpsest.errors import ConfigError, CorpusError
from palimpsest.log import log
from palimpsest.options import CorpusOptions
from text_fixture import write_words

ROW = {"prompt": "The river runs", "wanted": " past the mill", "unwanted": " a function"}
USER, YES, NO = (
    {"role": role, "content": content}
    for role, content in (("user", "Is it so?"), ("assistant", "Yes, it is"), ("assistant", "Yes, never"))
)


def read(tmp_path, tokenizer, *rows, tokens=1000, source=None, **options):
    """The behaviour of a file of these rows, and the texts it was read with."""
    path = tmp_path / "rows.jsonl"
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    corpus = str(write_words(tmp_path / "words.jsonl"))
    texts = Texts([corpus], tokenizer, CorpusOptions(**options), 512)
    (answers,) = read_behaviours((source or f"named={path}",), tokenizer, texts, tokens)
    return answers, texts


def counted(answers, texts, tokenizer, tokens_per_batch=4096):
    """By pair and sign: the text of the tokens that count."""
    found = {}
    for item in answers.items(texts, tokens_per_batch):
        document = item.batch.document.reshape(-1)[item.before]
        for number in document.unique().tolist():
            mine = document == number
            sign = item.sign[mine].unique()
            found[number // 2, float(sign)] = tokenizer.decode(item.ids[mine])
    return found


def test_plain_text_is_put_end_to_end_and_the_answers_count(tmp_path, tiny_tokenizer):
    answers, texts = read(tmp_path, tiny_tokenizer, ROW, ROW | {"wanted": " and the old mill"})
    assert answers.name == "named" and len(answers.pairs) == 2
    for tokens_per_batch in (4096, 1):
        found = counted(answers, texts, tiny_tokenizer, tokens_per_batch)
        assert {key: text.strip() for key, text in found.items()} == {
            (0, 1.0): "past the mill",
            (0, -1.0): "a function",
            (1, 1.0): "and the old mill",
            (1, -1.0): "a function",
        }


def test_what_both_answers_begin_with_cancels(tmp_path, tiny_tokenizer):
    answers, texts = read(
        tmp_path, tiny_tokenizer, {"prompt": "1 2", "wanted": " 3 4 5 8", "unwanted": " 3 4 5 6 7"}
    )
    found = counted(answers, texts, tiny_tokenizer)
    assert found[0, -1.0].strip() == "6 7" and found[0, 1.0].strip() == "8"


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": [USER], "wanted": [YES], "unwanted": [NO]},
        {"prompt": [USER], "chosen": [YES], "rejected": [NO]},
        {"prompt": USER["content"], "chosen": [YES], "rejected": NO["content"]},
        {"prompt": [USER, NO, USER], "wanted": YES["content"], "unwanted": NO["content"]},
    ],
    ids=["messages", "preference", "mixed", "earlier-turns"],
)
def test_conversations_count_what_the_assistant_says_last(tmp_path, tiny_tokenizer, row):
    answers, texts = read(tmp_path, tiny_tokenizer, row)
    found = counted(answers, texts, tiny_tokenizer)
    wanted, unwanted = found[0, 1.0], found[0, -1.0]
    # From the first token that differs, without the markup that ends the turn.
    assert (
        "Yes, it is".endswith(wanted) and "Yes, never".endswith(unwanted) and "Yes" not in wanted + unwanted
    )
    assert wanted and unwanted
    ids = answers.pairs[0].wanted.token_ids.tolist()
    messages = [*(row["prompt"] if isinstance(row["prompt"], list) else [USER]), YES]
    rendered = tiny_tokenizer.apply_chat_template(messages, tokenize=False)
    assert ids == tiny_tokenizer(rendered, add_special_tokens=False).input_ids


def test_batches_hold_every_answer_once_and_place_the_activations(tmp_path, tiny_tokenizer):
    rows = [ROW | {"wanted": f" number {n}" * (1 + n % 3)} for n in range(9)]
    answers, texts = read(tmp_path, tiny_tokenizer, *rows)
    items = list(answers.items(texts, 40))
    documents = torch.cat([item.batch.document.unique() for item in items])
    assert sorted(documents[documents >= 0].tolist()) == list(range(18)) and len(items) > 4
    assert sum(len(item.before) for item in items) == sum(pair.tokens for pair in answers.pairs)
    for item in items:
        assert item.corpus == -1 and torch.equal(item.places.flat, texts.places(item.batch).flat)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([ROW, {"prompt": "a", "wanted": "b"}], r"jsonl:2 has no unwanted or rejected\. Expected: .*wanted"),
        (
            [{"text": "a"}],
            r"jsonl:1 has no prompt, no wanted or chosen, no unwanted or rejected.*fields text",
        ),
        ([ROW | {"wanted": None}], "jsonl:1 has no wanted or chosen"),
        ([{}], "jsonl:1 has no prompt.*an empty object"),
        ([ROW, ROW, "{"], "jsonl:3 is no valid JSON"),
        ([[1, 2]], "holds one JSON array"),
        (["3"], "jsonl:1 is no object"),
        ([ROW | {"prompt": 5}], "jsonl:1 has a part of another type .user..*int"),
        (
            [{"prompt": [USER], "wanted": [{"role": "pirate", "content": "x"}], "unwanted": [NO]}],
            "jsonl:1 has a mess",
        ),
        ([ROW | {"unwanted": ROW["wanted"]}], "jsonl:1 has two answers that do not differ"),
        ([{"prompt": [YES], "wanted": [USER], "unwanted": [{**USER, "content": "No"}]}], "do not differ"),
        ([ROW | {"wanted": ""}], "an answer that is empty, or the beginning of the other"),
        ([ROW | {"unwanted": ROW["wanted"] + " again"}], "or the beginning of the other"),
        ([], "holds no rows"),
        (["", " "], "holds no rows"),
        ([ROW | {"prompt": "river " * 99}], r"would be cut off.*at most 64 tokens.*1 longer.*--max-length"),
    ],
)
def test_files_that_cannot_be_used_are_named_by_row(tmp_path, tiny_tokenizer, rows, message):
    with pytest.raises(CorpusError, match=message):
        read(tmp_path, tiny_tokenizer, *rows, max_length=64)


def test_a_missing_file_and_clashing_names(tmp_path, tiny_tokenizer):
    with pytest.raises(CorpusError, match=r"nowhere\.jsonl does not exist"):
        read(tmp_path, tiny_tokenizer, ROW, source=str(tmp_path / "nowhere.jsonl"))
    texts = Texts([str(write_words(tmp_path / "words.jsonl"))], tiny_tokenizer, CorpusOptions(), 512)
    for sources in (("a=x.jsonl", "a=y.jsonl"), ("kl=x.jsonl",)):
        with pytest.raises(ConfigError, match="different names, none of them kl"):
            read_behaviours(sources, tiny_tokenizer, texts, 10)


def test_an_answer_without_anything_before_it_is_refused(tmp_path, tiny_tokenizer):
    row = {"prompt": "", "wanted": "river", "unwanted": "mill"}
    with pytest.raises(CorpusError, match="jsonl:1 has answers with nothing before them"):
        read(tmp_path, tiny_tokenizer, row, prepend_bos=False)
    assert len(read(tmp_path, tiny_tokenizer, row)[0].pairs) == 1


def test_a_conversation_needs_a_template(tmp_path, tiny_tokenizer, monkeypatch):
    monkeypatch.setattr(tiny_tokenizer, "chat_template", None)
    with pytest.raises(CorpusError, match="no chat template"):
        read(tmp_path, tiny_tokenizer, {"prompt": [USER], "wanted": [YES], "unwanted": [NO]})


def test_long_pairs_are_left_out_and_long_files_are_cut_and_both_are_said(
    tmp_path, tiny_tokenizer, monkeypatch
):
    said = []
    monkeypatch.setattr(log, "warning", lambda text, *values: said.append(text % values))
    long = ROW | {"unwanted": " sacks" * 99}
    answers, _ = read(tmp_path, tiny_tokenizer, long, ROW, max_length=64)
    assert len(answers.pairs) == 1 and "1 of 2 rows are left out" in said[0]
    tokens = answers.pairs[0].tokens
    answers, _ = read(tmp_path, tiny_tokenizer, *[ROW] * 5, tokens=2 * tokens)
    assert len(answers.pairs) == 2 and "first 2 rows" in said[1] and len(said) == 2
    read(tmp_path, tiny_tokenizer, *[ROW] * 2, tokens=2 * tokens)
    assert len(said) == 2
