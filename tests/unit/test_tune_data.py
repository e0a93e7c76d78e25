"""Training data: rows against texts tokenised by hand, splits, what is left out, and what is refused."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from types import SimpleNamespace
from zlib import crc32

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from palimpsest.errors import ConfigError, CorpusError
from palimpsest.models import LanguageModel
from palimpsest.options import CorpusOptions, RunOptions
from palimpsest.tune.config import AdapterOptions, ObjectiveOptions, TuneConfig
from palimpsest.tune.data import hold_out_rows, load_data
from palimpsest.tune.rows import IGNORED, KtoRow, PairRow, PromptRow, TextRow

PAIR = {"prompt": "Seven apples and", "chosen": " five pears", "rejected": " a mill"}


@pytest.fixture
def write(tmp_path):
    """A function that writes rows to a file of any kind and returns its path."""
    folder = tmp_path / "tn-data"
    folder.mkdir()

    def make(rows, name="rows.jsonl"):
        path = folder / name
        if name.endswith(".parquet"):
            pq.write_table(pa.Table.from_pylist(rows), path)
        elif name.endswith(".csv"):
            with path.open("w", newline="") as file:
                table = csv.DictWriter(file, list(rows[0]))
                table.writeheader()
                table.writerows(rows)
        elif name.endswith(".json"):
            path.write_text(json.dumps(rows))
        else:
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(path)

    return make


@pytest.fixture
def load(tiny_tokenizer):
    def make(data, objective="sft", *, context=512, adapter=None, corpora=None, **options):
        given = (data,) if isinstance(data, str) else tuple(data)
        if objective == "grpo":
            options |= {"reward": "m:f"}
        config = TuneConfig(
            "base",
            run=RunOptions(out=Path("tn-out")),
            dictionary=("d",),
            adapter=AdapterOptions(**(adapter or {})),
            objective=ObjectiveOptions(objective=objective, data=given, **options),
            corpora=CorpusOptions(**(corpora or {})),
        )
        text_config = SimpleNamespace(max_position_embeddings=context)
        language = object.__new__(LanguageModel)
        language.tokenizer = tiny_tokenizer
        language.model = SimpleNamespace(config=SimpleNamespace(get_text_config=lambda: text_config))
        return load_data(config, language)

    return make


def ids(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def pairs(n):
    return [PAIR | {"prompt": f"{PAIR['prompt']} {place}"} for place in range(n)]


def test_plain_text_is_learned_whole_behind_its_bos(write, load, tiny_tokenizer):
    data = load(write([{"text": f"the miller counts {n}"} for n in range(6)]))
    row = data.train[0]
    assert row.input_ids == [tiny_tokenizer.bos_token_id, *ids(tiny_tokenizer, "the miller counts 0")]
    assert row.labels == [IGNORED, *row.input_ids[1:]]


def test_of_a_prompt_with_its_completion_the_completion_is_learned(write, load, tiny_tokenizer):
    rows = [{"prompt": "Seven apples and", "completion": f" {n} pears"} for n in range(6)]
    path = write(rows)
    row = load(path, eval_data=(path,)).train[1]
    prompt = [tiny_tokenizer.bos_token_id, *ids(tiny_tokenizer, "Seven apples and")]
    assert row.input_ids == [*prompt, *ids(tiny_tokenizer, " 1 pears"), tiny_tokenizer.eos_token_id]
    assert row.labels == [IGNORED] * len(prompt) + row.input_ids[len(prompt) :]


def test_answers_only_learns_the_assistants_words(write, load, tiny_tokenizer):
    talk = [{"role": "user", "content": "how many?"}, {"role": "assistant", "content": "Seven apples"}]
    path = write([{"messages": talk}] * 5)
    whole, answers = (load(path, eval_data=(path,), answers_only=only).train[0] for only in (False, True))
    assert whole.input_ids == answers.input_ids
    assert [label for label in whole.labels if label != IGNORED] == whole.input_ids[1:]
    learned = [label for label in answers.labels if label != IGNORED]
    assert tiny_tokenizer.decode(learned) == "Seven apples"


def test_dialogue_marks_tell_answers_in_plain_text(write, load, tiny_tokenizer):
    text = "User: how many?\n\nAssistant: Seven apples"
    path = write([{"text": text}] * 5)
    marks = {"dialogue": ("User:", "Assistant:")}
    row = load(path, eval_data=(path,), answers_only=True, corpora=marks).train[0]
    assert tiny_tokenizer.decode([label for label in row.labels if label != IGNORED]) == " Seven apples"


def test_texts_without_an_answer_are_counted_and_left_out(write, load):
    talk = [{"role": "user", "content": "how many?"}, {"role": "assistant", "content": "Seven"}]
    path = write([{"messages": talk}] * 5 + [{"text": "no answer here"}] * 2)
    data = load(path, answers_only=True, eval_data=(path,))
    assert len(data.train) == len(data.heldout) == 5
    assert "2 of 7 rows hold no token to learn" in data.notes[0]


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.parquet", "rows.csv"])
def test_pairs_of_text_come_from_every_kind_of_file(write, load, tiny_tokenizer, name):
    row = load(write(pairs(6), name), "dpo").train[0]
    assert row == PairRow(
        [tiny_tokenizer.bos_token_id, *ids(tiny_tokenizer, "Seven apples and 0")],
        [*ids(tiny_tokenizer, " five pears"), tiny_tokenizer.eos_token_id],
        [*ids(tiny_tokenizer, " a mill"), tiny_tokenizer.eos_token_id],
    )


def test_pairs_of_messages_are_rendered_with_the_chat_template(write, load, tiny_tokenizer):
    rows = [
        {
            "prompt": [{"role": "user", "content": "how many?"}],
            "chosen": [{"role": "assistant", "content": f"Seven {n}"}],
            "rejected": "None",
        }
        for n in range(5)
    ]
    path = write(rows)
    row = load(path, "dpo", eval_data=(path,)).train[1]
    rows = [rows[1]]
    template = tiny_tokenizer.apply_chat_template
    asked = template(rows[0]["prompt"], tokenize=False, add_generation_prompt=True)
    whole = template([*rows[0]["prompt"], *rows[0]["chosen"]], tokenize=False)
    assert row.prompt + row.chosen == ids(tiny_tokenizer, whole)
    assert tiny_tokenizer.decode(row.prompt) == asked
    assert "None" in tiny_tokenizer.decode(row.rejected)


def test_tokens_across_the_border_belong_to_the_answer(write, load, tiny_tokenizer):
    rows = [PAIR | {"prompt": "the mi", "chosen": "ller", "rejected": "sty river"}] * 4
    path = write(rows)
    row = load(path, "dpo", eval_data=(path,)).train[0]
    whole = [tiny_tokenizer.bos_token_id, *ids(tiny_tokenizer, "the miller"), tiny_tokenizer.eos_token_id]
    assert row.prompt + row.chosen == whole
    assert tiny_tokenizer.decode(row.prompt + row.rejected[:-1]) == "<s>the misty river"


def test_verdicts_and_prompts(write, load, tiny_tokenizer):
    rows = [{"prompt": "a b", "completion": f" {n}", "label": n % 2 == 0} for n in range(6)]
    bos, eos = tiny_tokenizer.bos_token_id, tiny_tokenizer.eos_token_id
    path, csv_path = write(rows), write(rows, "k.csv")
    data = load(path, "kto", eval_data=(path,))
    prompt = [bos, *ids(tiny_tokenizer, "a b")]
    assert data.train[0] == KtoRow(prompt, [*ids(tiny_tokenizer, " 0"), eos], True)
    assert data.train[1].label is False
    # A CSV file knows no truth values.
    from_csv = load(csv_path, "kto", eval_data=(path,))
    assert [row.label for row in from_csv.train] == [row.label for row in data.train]
    # Names that trl's own arguments have are not given to the reward.
    path = write([{"prompt": "a b", "answer": n, "prompts": "x", "completions": "y"} for n in range(5)])
    asked = load(path, "grpo", eval_data=(path,)).train[1]
    assert asked == PromptRow(prompt, "a b", {"answer": 1})


def text_row(*ids, prompt=0):
    return TextRow(list(ids), [IGNORED] * max(1, prompt) + list(ids[max(1, prompt) :]))


def test_a_tenth_of_the_rows_is_held_out_by_their_checksum(write, load):
    data = load(write(pairs(41)), "dpo")
    whole = load(write(pairs(41), "train.jsonl"), "dpo", eval_data=(write(pairs(3), "eval.jsonl"),))
    assert (len(whole.train), len(whole.heldout)) == (41, 3)
    lowest = sorted(whole.train, key=lambda row: crc32(" ".join(map(str, row.prompt)).encode()))[:4]
    assert data.heldout == [row for row in whole.train if row in lowest]
    assert data.train == [row for row in whole.train if row not in lowest]
    assert [len(load(write(pairs(41)), "dpo", hold_out=share).heldout) for share in (0.25, 0.5)] == [10, 20]


@pytest.mark.parametrize("copies", [1, 2, 3, 7])
def test_rows_with_one_prompt_are_on_one_side(copies):
    prompts = [[1, n, n % 3] for n in range(20)]
    rows = [PairRow(prompt, [copy], [9]) for copy in range(copies) for prompt in prompts]
    train, heldout = hold_out_rows(rows, 0.1)
    assert len(heldout) == 2 * copies
    assert not {tuple(row.prompt) for row in train} & {tuple(row.prompt) for row in heldout}
    assert [row for row in rows if row in heldout] == heldout
    again = hold_out_rows(rows[::-1], 0.1)
    assert again == (train[::-1], heldout[::-1])


def test_texts_are_held_out_by_their_prompt_or_as_a_whole():
    asked = [text_row(1, n // 2, 7, n, prompt=3) for n in range(40)]
    train, heldout = hold_out_rows(asked, 0.1)
    assert len(heldout) == 4
    assert not {row.input_ids[1] for row in train} & {row.input_ids[1] for row in heldout}
    plain = [text_row(1, 5, 5, n // 2) for n in range(40)]
    train, heldout = hold_out_rows(plain, 0.1)
    assert len(heldout) == 4
    assert not {tuple(row.input_ids) for row in train} & {tuple(row.input_ids) for row in heldout}


def test_more_than_half_is_never_held_out():
    rows = [text_row(1, 2, 3, n, prompt=3) for n in range(9)]
    assert hold_out_rows(rows, 0.5) == (rows, [])
    others = [text_row(1, n, 3, n, prompt=3) for n in (7, 8)]
    train, heldout = hold_out_rows(rows + others, 0.1)
    assert (train, heldout) == (rows, others)
    assert hold_out_rows([], 0.1) == ([], [])


def test_verdicts_are_held_out_by_label():
    rows = [KtoRow([1, n], [2], n < 37) for n in range(40)]
    train, heldout = hold_out_rows(rows, 0.1)
    assert [sum(row.label is label for row in heldout) for label in (True, False)] == [4, 1]
    # Each prompt with a good and a bad answer.
    both = [KtoRow([1, n], [label], bool(label)) for n in range(20) for label in (0, 1)]
    train, heldout = hold_out_rows(both, 0.1)
    assert [sum(row.label is label for row in heldout) for label in (True, False)] == [2, 2]
    assert not {row.prompt[1] for row in train} & {row.prompt[1] for row in heldout}
    with pytest.raises(CorpusError, match=r"Verdicts of both labels.*1 rows with label False"):
        hold_out_rows(rows[:38], 0.1)


def test_few_rows_still_leave_two_of_each(write, load):
    data = load(write(pairs(5)), "dpo")
    assert (len(data.train), len(data.heldout)) == (3, 2)
    with pytest.raises(CorpusError, match=r"too few rows held out.*Found: 1"):
        load(write(pairs(3)), "dpo")


def test_rows_that_do_not_fit_are_left_out_and_counted(write, load):
    rows = pairs(6) + [PAIR | {"rejected": " mill" * 60}]
    data = load(write(rows), "dpo", context=40)
    assert len(data.train) + len(data.heldout) == 6
    assert "1 of 7 rows are longer than 40 tokens" in data.notes[0]
    with pytest.raises(CorpusError, match=r"No row .* can be used.*longer than 4 tokens"):
        load(write(rows), "dpo", context=4)
    with pytest.raises(CorpusError, match="longer than 5 tokens"):
        load(write(rows), "dpo", corpora={"max_length": 5})


def test_a_prompt_leaves_room_for_its_completion(write, load):
    rows = [{"prompt": f"a {n}"} for n in range(5)] + [{"prompt": "mill " * 20}]
    data = load(write(rows), "grpo", context=30, completion_length=20)
    assert len(data.train) + len(data.heldout) == 5


def test_long_texts_are_cut(write, load):
    data = load(write([{"text": f"{n} " + "mill " * 50} for n in range(5)]), context=20)
    assert {len(row.input_ids) for row in data.train} == {20}
    assert data.notes == []


def test_pairs_that_prefer_nothing_are_left_out_and_counted(write, load):
    data = load(write([*pairs(6), PAIR | {"rejected": PAIR["chosen"]}]), "dpo")
    assert len(data.train) + len(data.heldout) == 6
    assert "1 of 7 rows have the same chosen and rejected answer" in data.notes[0]


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ({"prompt": "a", "chosen": "b"}, r"rows.jsonl:4 has no rejected.*the fields prompt, chosen"),
        (PAIR | {"chosen": "  "}, "rows.jsonl:4 has an empty chosen"),
        (PAIR | {"prompt": ""}, "rows.jsonl:4 has an empty prompt"),
        (PAIR | {"rejected": 3}, "rows.jsonl:4 has a rejected that cannot be read"),
        (PAIR | {"chosen": [{"role": "assistant", "content": ""}]}, "rows.jsonl:4 has an empty chosen"),
        (
            PAIR | {"chosen": [{"role": "poet", "content": "x"}]},
            "rows.jsonl:4 has a chosen that cannot be read",
        ),
        (["no", "object"], "rows.jsonl:4 is no object"),
    ],
)
def test_a_bad_pair_is_named_by_its_row(write, load, bad, words):
    rows = [*pairs(3), bad, *pairs(3)]
    with pytest.raises(CorpusError, match=words):
        load(write(rows), "dpo")
    data = load(write(rows), "dpo", corpora={"skip_bad_rows": True})
    assert len(data.train) + len(data.heldout) == 6
    assert "1 of 7 rows cannot be read" in data.notes[0]


def test_bad_rows_of_other_kinds(write, load):
    row = {"prompt": "a", "completion": " b"}
    with pytest.raises(CorpusError, match=r"rows.jsonl:2 has a label that is no verdict.*'maybe'"):
        load(write([row | {"label": True}, row | {"label": "maybe"}]), "kto")
    with pytest.raises(CorpusError, match="rows.jsonl:1 has no label"):
        load(write([row]), "kto")
    with pytest.raises(CorpusError, match="All verdicts are the same"):
        load(write([row | {"label": True}] * 8), "kto")
    with pytest.raises(CorpusError, match="rows.jsonl:1 has an empty completion"):
        load(write([{"prompt": "a", "completion": ""}]))
    with pytest.raises(CorpusError, match=r"rows.jsonl:2 holds no text"):
        load(write([{"text": "a b"}, {"poem": "x"}]))
    with pytest.raises(CorpusError, match=r"rows.jsonl:2 holds no text"):
        load(write([{"text": "a b"}, {"text": ""}]))


def test_bad_files(write, load, tmp_path):
    with pytest.raises(CorpusError, match="does not exist"):
        load(str(tmp_path / "tn-none.jsonl"), "dpo")
    (tmp_path / "tn-x.json").write_text("[{]")
    with pytest.raises(CorpusError, match="no readable JSON array"):
        load(str(tmp_path / "tn-x.json"), "dpo")
    (tmp_path / "tn-x.xls").write_text("?")
    with pytest.raises(CorpusError, match="no known kind"):
        load(str(tmp_path / "tn-x.xls"), "dpo")
    (tmp_path / "tn-x.csv").write_text("prompt,chosen,rejected\na,b\n")
    with pytest.raises(CorpusError, match="row 1, has more or fewer cells"):
        load(str(tmp_path / "tn-x.csv"), "dpo")


def test_half_a_surrogate_pair_is_repaired(tmp_path, load):
    path = tmp_path / "tn-s.jsonl"
    line = '{"prompt": "%d \\ud83d b", "chosen": " c", "rejected": " d"}\n'
    path.write_text("".join(line % n for n in range(5)))
    assert len(load(str(path), "dpo").train) == 3


def test_a_scope_needs_rows_that_say_what_is_prompt(write, load):
    text = [{"text": f"a {n} c"} for n in range(5)]
    asked = [{"prompt": f"a {n}", "completion": " b"} for n in range(5)]
    with pytest.raises(CorpusError, match="--scope answer needs to know"):
        load(write(text), adapter={"scope": "answer"})
    general = (write(text, "g.jsonl"),)
    for scope, noted in (
        ("answer", True),
        ("prompt", True),
        ("last", True),
        ("first", False),
        ("all", False),
    ):
        data = load(write(asked), adapter={"scope": scope}, general=general)
        assert data.train
        assert any(f"nothing is measured with --scope {scope}" in note for note in data.notes) == noted


def test_retained_and_general_text(write, load):
    rows, general = write([{"text": f"a {n}"} for n in range(30)]), write([{"text": "b"}] * 9, "g.jsonl")
    data = load(rows, "unlearn", retain=(rows,), general=(general,), eval_rows=4)
    assert (len(data.retain), len(data.retain_heldout), len(data.general)) == (27, 3, 4)
    assert set(data.inputs) == {"data", "retain", "general"}


def test_general_text_is_spread_over_its_files(write, load, tiny_tokenizer):
    rows = write([{"text": f"a {n}"} for n in range(9)])
    files = [write([{"text": f"{name} {n}"} for n in range(30)], f"{name}.jsonl") for name in ("b", "c")]
    data = load(rows, general=tuple(files), eval_rows=4)
    assert [tiny_tokenizer.decode(row.input_ids[1:]) for row in data.general] == [
        "b 7",
        "b 22",
        "c 7",
        "c 22",
    ]
    long = write([{"text": f"b {n}"} for n in range(99)], "long.jsonl")
    data = load(rows, general=(long,), eval_rows=2)
    assert [tiny_tokenizer.decode(row.input_ids[1:]) for row in data.general] == ["b 10", "b 30"]


def test_conversations_need_a_chat_template(write, load, tiny_tokenizer, monkeypatch):
    monkeypatch.setattr(tiny_tokenizer, "chat_template", None)
    rows = [PAIR | {"prompt": [{"role": "user", "content": "x"}]}]
    with pytest.raises(CorpusError, match="no chat template"):
        load(write(rows), "dpo")


def test_options_refuse_what_does_not_go_together():
    with pytest.raises(ConfigError, match="ruins the model"):
        ObjectiveOptions(objective="unlearn", data=("x",))
    for objective in ("dpo", "kto", "simpo", "unlearn"):
        retain = ("x",) if objective == "unlearn" else ()
        with pytest.raises(ConfigError, match="beta must be above 0"):
            ObjectiveOptions(objective=objective, data=("x",), retain=retain, beta=0.0)
    ObjectiveOptions(objective="orpo", data=("x",), beta=0.0)
