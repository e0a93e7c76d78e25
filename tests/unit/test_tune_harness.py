"""Tasks of lm-evaluation-harness through its own API, offline."""

from __future__ import annotations

import json
import sys

import pytest
import torch

from pair_fixture import load_hf, lora
from palimpsest.errors import ConfigError
from palimpsest.tune.harness import compare_lm_eval, run_lm_eval

WORDS = ["river", "mill", "flour", "miller", "sacks", "apples"]
TASK = """
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {file}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{gold}}}}"
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""


@pytest.fixture
def tasks(tmp_path, monkeypatch):
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    rows = [
        {
            "question": f"The {WORDS[i]} and the",
            "choices": [WORDS[(i + 1) % 6], WORDS[(i + 2) % 6]],
            "gold": i % 2,
        }
        for i in range(6)
    ]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "words.yaml").write_text(TASK.format(name="palimpsest_words", file=file))
    return str(folder), rows


def right(model, tokenizer, rows):
    """Share of rows whose right choice has the larger log-probability, one row at a time."""
    hits = []
    for row in rows:
        scores = []
        for choice in row["choices"]:
            start = tokenizer(row["question"], add_special_tokens=False)["input_ids"]
            whole = tokenizer(f"{row['question']} {choice}", add_special_tokens=False)["input_ids"]
            with torch.no_grad():
                rows_of = model(input_ids=torch.tensor([whole])).logits[0].log_softmax(-1)
            scores.append(sum(rows_of[t - 1, whole[t]].item() for t in range(len(start), len(whole))))
        hits.append(scores.index(max(scores)) == row["gold"])
    return sum(hits) / len(hits)


def test_base_and_tuned_are_scored_as_by_hand(tiny_llama, tiny_tokenizer, tasks):
    from peft import get_peft_model

    folder, rows = tasks
    torch.manual_seed(0)
    model = get_peft_model(load_hf(tiny_llama()), lora())
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = torch.randn_like(parameter)
    model.train()
    found = compare_lm_eval(model, tiny_tokenizer, ["palimpsest_words"], None, folder)
    assert model.training
    model.eval()
    assert found["tuned"]["palimpsest_words"]["acc"] == pytest.approx(right(model, tiny_tokenizer, rows))
    with model.disable_adapter():
        assert found["base"]["palimpsest_words"]["acc"] == pytest.approx(right(model, tiny_tokenizer, rows))
    few = run_lm_eval(model, tiny_tokenizer, ["palimpsest_words"], 2, folder)
    assert few["palimpsest_words"]["acc"] == pytest.approx(right(model, tiny_tokenizer, rows[:2]))


def test_unknown_tasks_and_folders_are_named(tiny_llama, tiny_tokenizer, tasks, monkeypatch):
    from lm_eval import tasks as harness

    class Short(harness.TaskManager):
        """Without the thousands of tasks that the harness brings, which take long to list."""

        def __init__(self, **options):
            super().__init__(**options | {"include_defaults": False})

    monkeypatch.setattr(harness, "TaskManager", Short)
    model = load_hf(tiny_llama())
    with pytest.raises(ConfigError, match="no such task"):
        run_lm_eval(model, tiny_tokenizer, ["palimpsest_nothing"], 2, tasks[0])
    with pytest.raises(ConfigError, match="no folder"):
        run_lm_eval(model, tiny_tokenizer, ["palimpsest_words"], 2, "/nowhere")


def test_without_the_harness_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ConfigError, match=r"palimpsest-lm\[lm-eval\]"):
        run_lm_eval(None, None, ["x"])
