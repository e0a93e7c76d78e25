"""Dialogues in plain text: who wrote which token, and what stays as it was without the option."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest

from palimpsest.audit.battery.folder import Battery
from palimpsest.corpus import Corpus, Role
from palimpsest.corpus.tokenize import DocumentTokenizer, dialogue_roles
from palimpsest.errors import ConfigError, CorpusError
from palimpsest.options import ADDED, CorpusOptions, as_flags, config_dict

MARKS = ("User:", "Assistant:")
LETTERS = {Role.TEXT: "x", Role.USER: "u", Role.ASSISTANT: "a", Role.TEMPLATE: "-"}


def write(path, *rows):
    path.write_text(
        "".join(json.dumps(row if isinstance(row, dict) else {"text": row}) + "\n" for row in rows)
    )
    return path


def spoken(document, tokenizer):
    """Text of each run of tokens of one role."""
    runs = []
    for index, role in zip(document.token_ids, document.roles, strict=True):
        if not runs or runs[-1][0] != role:
            runs.append((int(role), []))
        runs[-1][1].append(int(index))
    return [(Role(role), tokenizer.decode(ids)) for role, ids in runs]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("User: hi\n\nAssistant: ho\n", "-----uuu------------aaaa"),
        ("Once.\nUser:a", "xxxxx------u"),
        (" \n User: a", "--------uu"),
        ("User:Assistant:User:", "-" * 20),
        ("User: \n Assistant:b", "-" * 18 + "a"),
        ("SuperUser: a", "xxxxx-----uu"),
        ("user: a Assistant b", None),
        ("", None),
    ],
)
def test_every_character_has_its_speaker(text, expected):
    found = dialogue_roles(text, MARKS)
    assert (None if found is None else "".join(LETTERS[Role(role)] for role in found)) == expected


@pytest.mark.parametrize("marks", [("Q", "Q:"), ("Q:", "Q")])
def test_of_marks_that_begin_alike_the_longer_counts(marks):
    found = dialogue_roles("Q a Q: b", marks)
    assert found is not None
    expected = (
        {"Q": Role.USER, "Q:": Role.ASSISTANT} if marks[0] == "Q" else {"Q:": Role.USER, "Q": Role.ASSISTANT}
    )
    assert found[2] == expected["Q"] and found[-1] == expected["Q:"]


def test_marks_are_no_patterns():
    assert dialogue_roles("Uxer", ("U.er", "b")) is None
    found = dialogue_roles("<|u|>a<|b|>c", ("<|u|>", "<|b|>"))
    assert found is not None and found[5] == Role.USER and found[-1] == Role.ASSISTANT


def test_tokens_take_the_role_of_their_characters(tmp_path, tiny_tokenizer):
    rows = ("User: Seven apples?\n\nAssistant: Twelve pieces.\n\nUser: And pears?", "The river runs past.")
    path = write(tmp_path / "a.jsonl", *rows)
    first, second = Corpus(path, tiny_tokenizer, dialogue=MARKS, prepend_bos=False).documents()
    found = [(role, text.strip()) for role, text in spoken(first, tiny_tokenizer)]
    assert found == [
        (Role.TEMPLATE, "User:"),
        (Role.USER, "Seven apples?"),
        (Role.TEMPLATE, "Assistant:"),
        (Role.ASSISTANT, "Twelve pieces."),
        (Role.TEMPLATE, "User:"),
        (Role.USER, "And pears?"),
    ]
    assert set(second.roles) == {Role.TEXT}
    plain = Corpus(path, tiny_tokenizer, prepend_bos=False)
    for document, other in zip(plain.documents(), (first, second), strict=True):
        assert np.array_equal(document.token_ids, other.token_ids)
        assert set(document.roles) == {Role.TEXT}


def test_roles_choose_what_is_measured(tmp_path, tiny_tokenizer):
    path = write(tmp_path / "a.jsonl", "User: one\n\nAssistant: two", "no dialogue")
    corpus = Corpus(path, tiny_tokenizer, dialogue=MARKS, roles=("assistant",))
    (batch,) = corpus.batches()
    assert tiny_tokenizer.decode(batch.input_ids[batch.keep]).strip() == "two"
    with pytest.raises(CorpusError, match="no token to measure"):
        list(Corpus(path, tiny_tokenizer, roles=("assistant",)).batches())


def test_a_long_dialogue_is_cut_as_any_text(tmp_path, tiny_tokenizer):
    text = "User: " + "seven apples " * 3000 + "Assistant: no"
    path = write(tmp_path / "a.jsonl", text)
    (cut,) = Corpus(path, tiny_tokenizer, dialogue=MARKS, max_length=64).documents()
    assert len(cut) == 64 and set(cut.roles) == {Role.TEMPLATE, Role.USER}
    ids = np.concatenate(
        [
            batch.input_ids[batch.role == Role.ASSISTANT]
            for batch in Corpus(path, tiny_tokenizer, dialogue=MARKS).blocks(128)
        ]
    )
    assert tiny_tokenizer.decode(ids).strip() == "no"


def test_conversations_keep_their_own_roles(tmp_path, tiny_tokenizer):
    message = {"role": "assistant", "content": "User: is what I was asked to write"}
    row = {"messages": [{"role": "user", "content": "Write"}, message]}
    path = write(tmp_path / "a.jsonl", row)
    with_marks, without = (
        next(Corpus(path, tiny_tokenizer, dialogue=marks).documents()) for marks in (MARKS, ())
    )
    assert np.array_equal(with_marks.roles, without.roles)
    assert Role.ASSISTANT in with_marks.roles


@pytest.mark.parametrize(
    "marks", [("User:",), ("a", "b", "c"), ("User:", "User:"), ("User:", ""), (" ", "b")]
)
def test_marks_that_mark_nothing_are_refused(tmp_path, tiny_tokenizer, marks):
    path = write(tmp_path / "a.jsonl", "User: a")
    with pytest.raises(ConfigError, match="two marks"):
        Corpus(path, tiny_tokenizer, dialogue=marks)


def test_what_does_not_go_with_a_dialogue_is_refused(tmp_path, tiny_tokenizer):
    path = write(tmp_path / "a.jsonl", "User: a")
    with pytest.raises(ConfigError, match="answer_chars"):
        Corpus(path, tiny_tokenizer, dialogue=MARKS, answer_chars=10)
    slow = SimpleNamespace(
        is_fast=False, bos_token_id=None, all_special_ids=[], added_tokens_decoder={}, chat_template=None
    )
    with pytest.raises(CorpusError, match="character offsets"):
        DocumentTokenizer(slow, CorpusOptions(dialogue=MARKS), None)
    DocumentTokenizer(slow, CorpusOptions(), None)


def test_unset_the_option_leaves_no_trace_in_a_config():
    """Runs that were begun before there was the option go on with `resume`."""
    assert "dialogue" in ADDED
    assert "dialogue" not in config_dict(CorpusOptions())
    assert config_dict(CorpusOptions(dialogue=MARKS))["dialogue"] == list(MARKS)
    assert {"roles", "max_documents", "answer_chars"} <= config_dict(CorpusOptions()).keys()
    assert as_flags(CorpusOptions(dialogue=MARKS)) == ["--dialogue", *MARKS]


@pytest.mark.parametrize("marks", [(), MARKS])
def test_a_battery_reads_further_text_as_it_read_its_own(marks):
    made = object.__new__(Battery)
    config = {"corpora": config_dict(CorpusOptions(dialogue=marks))}
    made.artifact = SimpleNamespace(manifest={"config": config})
    made.description = {"max_length": 99}
    assert made.text_options == CorpusOptions(dialogue=marks, max_length=99)
