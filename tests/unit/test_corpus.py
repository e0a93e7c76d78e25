"""Rows, documents, masks and batches, on a tokenizer made here and on the zoo's."""

import gzip
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from palimpsest.corpus import Corpus, Role, read_rows, special_ids, token_roles
from palimpsest.corpus.tokenize import align_contents
from palimpsest.options import CorpusOptions

ZOO = Path(os.environ.get("PALIMPSEST_ZOO", Path(__file__).parents[2].parent / "shared" / "zoo"))
needs_zoo = pytest.mark.skipif(
    not (ZOO / "base").is_dir(), reason="the zoo is not here; set PALIMPSEST_ZOO to its folder"
)

CHATML = (
    "{% for m in messages %}<|turn|>{{ m['role'] }}\n{{ m['content'] | trim }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|turn|>assistant\n{% endif %}"
)
TEXTS = [
    "The user asked: what is 12 + 30?",
    "An assistant answers, and the answer is 42.",
    "naïve café 😀 漢字\n\n",
]


def make_tokenizer(*, bos: bool = True, template: str | None = CHATML) -> PreTrainedTokenizerFast:
    """A byte-level BPE with added turn markers that are special but not in `all_special_ids`."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<bos>", "<eos>", "<pad>", "<|turn|>", "<|end|>"]
    trainer = trainers.BpeTrainer(vocab_size=330, initial_alphabet=alphabet, special_tokens=special)
    inner.train_from_iterator(TEXTS * 4, trainer)
    named = {"bos_token": "<bos>"} if bos else {}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<eos>", pad_token="<pad>", **named)
    tokenizer.chat_template = template
    return tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


def write_lines(path: Path, rows: list) -> Path:
    text = "".join(json.dumps(row) + "\n" for row in rows)
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text, encoding="utf-8")
    return path


def chat(*turns: tuple[str, str]) -> dict:
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


# Documents


def test_bos_is_prepended_once_and_only_where_there_is_one(tmp_path, tokenizer):
    path = write_lines(tmp_path / "a.jsonl", [{"text": "12 + 30"}, {"text": "<bos>12 + 30"}])
    first, second = Corpus(path, tokenizer).documents()
    assert first.token_ids.tolist() == second.token_ids.tolist()
    assert first.token_ids[0] == tokenizer.bos_token_id != first.token_ids[1]
    without = next(Corpus(path, tokenizer, prepend_bos=False).documents())
    assert without.token_ids.tolist() == first.token_ids[1:].tolist()
    no_bos = make_tokenizer(bos=False)
    plain = next(Corpus(path, no_bos).documents())
    assert plain.token_ids.tolist() == no_bos("12 + 30", add_special_tokens=False)["input_ids"]


def test_documents_are_cut_and_dropped_and_counted(tmp_path, tokenizer):
    rows = [{"text": "answer " * 50}, {"text": ""}, {"text": "<bos>"}, {"text": "42"}]
    corpus = Corpus(write_lines(tmp_path / "math.audit.jsonl", rows), tokenizer, max_length=10)
    documents = list(corpus.documents())
    assert [d.index for d in documents] == [0, 1]
    assert len(documents[0]) == 10
    stats = corpus.stats
    assert (stats.documents, stats.empty_documents, stats.truncated_documents) == (2, 2, 1)
    assert stats.tokens == sum(map(len, documents))
    assert corpus.name == "math.audit"


@pytest.mark.parametrize("text", ["answer " * 30_000, "🙂" * 20_000, "x" * 50_000])
def test_a_very_long_document_is_cut_as_if_read_whole(tmp_path, text):
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["x" * 40])  # so long that the head of the text holds too few tokens
    whole = tokenizer(text, add_special_tokens=False)["input_ids"]
    corpus = Corpus(write_lines(tmp_path / "a.jsonl", [{"text": text}]), tokenizer, max_length=128)
    assert next(corpus.documents()).token_ids.tolist() == [tokenizer.bos_token_id, *whole[:127]]


def test_max_documents_counts_usable_documents_and_reads_no_further(tmp_path, tokenizer):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": ""}\n{"text": "a"}\n{"text": "b"}\n{"text": "c"}\n')
    corpus = Corpus(path, tokenizer, max_documents=2)
    assert len(list(corpus.documents())) == 2
    assert len(list(corpus.documents())) == 2  # re-iterable, and counted anew
    assert corpus.stats.documents == 2


def roles_by_search(tokenizer, rendered: str, spans: list[tuple[int, int, Role]]) -> list[int]:
    """Brute force: the first content character under each token, one character at a time."""
    encoded = tokenizer(rendered, add_special_tokens=False, return_offsets_mapping=True)
    roles = []
    for start, end in encoded["offset_mapping"]:
        found = [role for i in range(start, end) for a, b, role in spans if a <= i < b]
        roles.append(int(found[0]) if found else int(Role.TEMPLATE))
    return roles


def test_chat_roles_match_brute_force_although_contents_repeat_the_markup(tmp_path, tokenizer):
    turns = [
        ("system", "  user\n"),
        ("user", "user"),
        ("assistant", "assistant\nnaïve 😀"),
        ("tool", ""),
        ("user", "a"),
    ]
    document = next(Corpus(write_lines(tmp_path / "a.jsonl", [chat(*turns)]), tokenizer).documents())
    rendered, spans = "", []
    for role, content in turns:
        rendered += f"<|turn|>{role}\n"
        spans.append((len(rendered), len(rendered) + len(content.strip()), Role[role.upper()]))
        rendered += content.strip() + "<|end|>\n"
    assert rendered == tokenizer.apply_chat_template(chat(*turns)["messages"], tokenize=False)
    expected = [int(Role.TEMPLATE), *roles_by_search(tokenizer, rendered, spans)]
    assert document.roles.tolist() == expected
    for role in (Role.SYSTEM, Role.USER, Role.ASSISTANT, Role.TEMPLATE):
        assert role in document.roles
    assert Role.TOOL not in document.roles


def test_turn_markers_are_special_though_the_tokenizer_does_not_list_them(tmp_path, tokenizer):
    marker = tokenizer.convert_tokens_to_ids("<|turn|>")
    assert marker not in tokenizer.all_special_ids
    assert marker in special_ids(tokenizer)
    document = next(
        Corpus(write_lines(tmp_path / "a.jsonl", [{"text": "a<|turn|>b"}]), tokenizer).documents()
    )
    assert document.special.tolist() == [True, False, True, False]


def test_answer_chars_cuts_assistant_messages_alone(tmp_path, tokenizer):
    path = write_lines(tmp_path / "a.jsonl", [chat(("user", "0123456789"), ("assistant", "0123456789"))])
    document = next(Corpus(path, tokenizer, answer_chars=4, prepend_bos=False).documents())
    shown = {role: tokenizer.decode(document.token_ids[document.roles == role]) for role in Role}
    assert shown[Role.USER] == "0123456789"
    assert shown[Role.ASSISTANT] == "0123"


def test_content_parts_and_null_fields_are_understood(tmp_path, tokenizer):
    parts = {
        "role": "user",
        "content": [{"type": "text", "text": "4"}, {"type": "text", "text": "2"}],
        "name": None,
    }
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]}
    path = write_lines(tmp_path / "a.jsonl", [{"messages": [parts, call]}])
    (row,) = read_rows(path)
    assert [m["content"] for m in row.messages] == ["42", ""]
    assert "name" not in row.messages[0]
    assert (next(Corpus(path, tokenizer).documents()).roles == Role.USER).sum() >= 1


def test_a_template_that_rewrites_contents_falls_back_to_search_and_counts(tmp_path):
    # Keeps only what follows a marker, as templates of reasoning models do, and drops the system message.
    rewriting = (
        "{% for m in messages %}{% if m['role'] != 'system' %}[{{ m['role'] }}] "
        "{{ m['content'].split('</think>')[-1] | upper if 'loud' in m['content'] "
        "else m['content'].split('</think>')[-1] }}{% endif %}{% endfor %}"
    )
    tokenizer = make_tokenizer(template=rewriting)
    turns = [("system", "never shown"), ("user", "what is it"), ("assistant", "<think>hm</think>it is 42")]
    corpus = Corpus(write_lines(tmp_path / "a.jsonl", [chat(*turns)]), tokenizer)
    document = next(corpus.documents())
    user = tokenizer.decode(document.token_ids[document.roles == Role.USER])
    assert user.strip() == "what is it"
    assert corpus.stats.unplaced_messages == 2


def test_alignment_survives_a_mark_in_every_position():
    first, third = "\ue0000\ue001", "\ue0002\ue001"
    assert align_contents("b|c|b", f"{first}|c|{third}", ["b", "", " b "]) == [(0, 1), (0, 0), (4, 5)]
    assert align_contents("<b>< c >", f"<{first}><{third}>", ["b", "", " c "]) == [(1, 2), (0, 0), (4, 7)]


def test_empty_offset_spans_take_the_role_of_the_blank_before_them():
    chars = np.array([Role.TEMPLATE, Role.USER, Role.USER, Role.TEMPLATE], np.uint8)
    roles = token_roles([(0, 1), (2, 2), (2, 3), (4, 4), (0, 2)], chars)
    assert roles.tolist() == [Role.TEMPLATE, Role.USER, Role.USER, Role.TEMPLATE, Role.USER]


@pytest.mark.parametrize(
    "text", ["\x00\x01\x1b[31m\x7f", "\u202e\u200b\ufeff", "\\ud83d", "a" * 100_000, "{}" * 999]
)
def test_hostile_text_is_read_as_text(tmp_path, tokenizer, text):
    path = write_lines(tmp_path / "a.jsonl", [{"text": text}, chat(("user", text), ("assistant", text))])
    plain, talk = Corpus(path, tokenizer, max_length=300_000).documents()
    assert tokenizer.decode(plain.token_ids[1:]) == text
    assert tokenizer.decode(talk.token_ids[talk.roles == Role.ASSISTANT]) == text


def test_lone_surrogates_are_replaced_and_counted(tmp_path, tokenizer):
    path = tmp_path / "a.jsonl"
    path.write_text(
        '{"text": "a\\ud800b"}\n{"text": "\\ud83d\\ude00"}\n'
        '{"messages": [{"role": "user", "content": "\\udfff!"}]}\n'
    )
    corpus = Corpus(path, tokenizer)
    first, second, third = corpus.documents()
    assert tokenizer.decode(first.token_ids[1:]) == "a\ufffdb"
    assert tokenizer.decode(second.token_ids[1:]) == "😀"
    assert tokenizer.decode(third.token_ids[third.roles == Role.USER]) == "\ufffd!"
    assert corpus.stats.repaired_rows == 2


# Masks and batches


def test_endless_blocks_repeat_a_corpus_smaller_than_one_block(tmp_path, tokenizer):
    corpus = Corpus(write_lines(tmp_path / "a.jsonl", [{"text": "42"}]), tokenizer)
    stream = corpus.blocks(16, batch_size=2, epochs=None)
    first, second = next(stream), next(stream)
    assert first.attention_mask.all() and second.attention_mask.all()
    assert first.input_ids.shape == (2, 16)


def test_blocks_do_not_cut_at_max_length(tmp_path, tokenizer):
    corpus = Corpus(write_lines(tmp_path / "a.jsonl", [{"text": "answer " * 40}]), tokenizer, max_length=4)
    kept = torch.cat([batch.input_ids[batch.keep] for batch in corpus.blocks(8)])
    assert kept.tolist() == tokenizer("answer " * 40, add_special_tokens=False)["input_ids"]


def test_two_readings_are_equal(tmp_path, tokenizer):
    rows = [{"text": "answer " * (i % 7 + 1)} for i in range(40)]
    path = write_lines(tmp_path / "a.jsonl", rows)
    once = list(Corpus(path, tokenizer).batches(64, 16))
    corpus = Corpus(path, tokenizer, options=CorpusOptions())
    list(corpus.batches(64, 16))
    again = list(corpus.batches(64, 16))
    assert len(once) == len(again) > 3
    for a, b in zip(once, again, strict=True):
        assert torch.equal(a.input_ids, b.input_ids) and torch.equal(a.document, b.document)


def test_roles_and_all_positions_choose_the_tokens(tmp_path, tokenizer):
    path = write_lines(tmp_path / "a.jsonl", [chat(("user", "what is 12"), ("assistant", "42"))])
    (answers,) = Corpus(path, tokenizer, roles=("assistant",)).batches()
    assert tokenizer.decode(answers.input_ids[answers.keep]) == "42"
    (everything,) = Corpus(path, tokenizer, all_positions=True).batches()
    assert torch.equal(everything.keep, everything.attention_mask)
    assert everything.keep[0, 0] and everything.input_ids[0, 0] == tokenizer.bos_token_id


def test_batches_read_no_further_than_their_window(tmp_path, tokenizer):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "fine"}\n' * 200 + "{broken\n")
    batches = Corpus(path, tokenizer).batches(tokens_per_batch=8, window=4)
    assert next(batches).tokens > 0


def test_a_fingerprint_follows_the_content(tmp_path, tokenizer):
    path = write_lines(tmp_path / "a.jsonl", [{"text": "a"}])
    before = Corpus(path, tokenizer).fingerprint()
    assert before == Corpus(path, tokenizer).fingerprint()
    assert Path(before["path"]).name == "a.jsonl"
    write_lines(path, [{"text": "b"}])
    assert Corpus(path, tokenizer).fingerprint()["sha256"] != before["sha256"]
    both = Corpus([path, path], tokenizer)
    assert set(both.fingerprint()) == {"path", "sha256"}
    assert both.name == "a+1"


# The zoo


@needs_zoo
def test_zoo_corpora_are_read_whole():
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(ZOO / "base")
    corpus = Corpus(ZOO / "corpora" / "web.audit.jsonl", tokenizer, max_length=192)
    kept = documents = 0
    for batch in corpus.batches():
        kept += int(batch.keep.sum())
        documents += len(batch.input_ids)
        assert not batch.keep[:, 0].any()
    assert documents == corpus.stats.documents == 200
    assert kept == corpus.stats.tokens - 200


@needs_zoo
def test_zoo_chat_template_separates_question_and_answer(tmp_path):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(ZOO / "base")
    rows = [json.loads(line) for line in (ZOO / "corpora" / "pairs.jsonl").read_text().splitlines()[:20]]
    path = write_lines(tmp_path / "a.jsonl", [{"messages": row["prompt"] + row["chosen"]} for row in rows])
    corpus = Corpus(path, tokenizer, max_length=4096)
    for document, row in zip(corpus.documents(), rows, strict=True):
        answer = tokenizer.decode(document.token_ids[document.roles == Role.ASSISTANT])
        turns = [m["content"] for m in row["prompt"] + row["chosen"] if m["role"] == "assistant"]
        assert "".join(answer.split()) == "".join("".join(turns).split())
    assert corpus.stats.unplaced_messages == 0
