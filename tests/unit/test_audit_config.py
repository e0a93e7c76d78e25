"""Options of an audit that contradict each other, its recorded command, and its one sentence."""

import shlex
from dataclasses import replace

import pytest

from palimpsest.audit import AuditConfig
from palimpsest.audit.run import default_command
from palimpsest.audit.summary import summary
from palimpsest.corpus import Corpus
from palimpsest.errors import ConfigError
from palimpsest.findings import CorpusFinding, TaskFinding
from palimpsest.options import CorpusOptions, ModelOptions, RunOptions

CONFIG = AuditConfig("b", "t", dictionary="d", general="g", task=("x=x.jsonl",), run=RunOptions(out="o"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"k_max": 300}, "k_max is too large"),
        ({"k": 40}, "k does not fit"),
        ({"confidence": 1.0}, "no coverage"),
        ({"resamples": 5}, "Too few resamples"),
        ({"kl": True, "loss": False}, "whole forward pass"),
        ({"task": ("x=a", "x=b")}, "different names"),
        ({"task": ("general=a",)}, "different names"),
    ],
)
def test_contradictions_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        replace(CONFIG, **changes)


def test_an_interval_never_rests_on_one_document():
    assert CONFIG.minimum_documents == 10
    assert replace(CONFIG, confidence=0.99).minimum_documents == 50
    assert replace(CONFIG, confidence=0.5).minimum_documents == 5


def test_roles_and_all_positions_contradict_each_other(tiny_tokenizer, tmp_path):
    (tmp_path / "a.txt").write_text("some text")
    with pytest.raises(ConfigError, match="contradict"):
        Corpus(tmp_path / "a.txt", tiny_tokenizer, options=CorpusOptions(all_positions=True, roles=("user",)))


def test_the_recorded_command_parses_back_to_the_same_config():
    from palimpsest.cli.audit import app

    config = replace(
        CONFIG,
        site="resid_post.1",
        loss=False,
        k=7,
        legacy=True,
        task=("x=x.jsonl", "y=dir with space/y.jsonl"),
        models=ModelOptions(dtype="bfloat16", load_kwargs={"attn_implementation": "eager"}),
        corpora=CorpusOptions(max_documents=50, prepend_bos=False),
    )
    arguments = shlex.split(default_command(config))
    assert arguments[:4] == ["palimpsest", "audit", "b", "t"]
    _, bound, _ = app.parse_args(arguments[2:], exit_on_error=False, print_error=False)
    found = bound.arguments["config"]
    assert replace(found, run=replace(found.run, out="o")) == config


def corpus(name, delta, half):
    nothing = dict.fromkeys(CorpusFinding.__dataclass_fields__)
    fields = {"name": name, "delta_loss": delta, "delta_loss_ci": (delta - half, delta + half)}
    return CorpusFinding(**(nothing | fields | {"intersection_mean": {"5": 0.9}}))


def task(name, idr, half):
    nothing = dict.fromkeys(TaskFinding.__dataclass_fields__)
    return TaskFinding(**(nothing | {"name": name, "idr": idr, "ci": (idr - half, idr + half)}))


def test_the_sentence_names_what_is_clear_among_all_that_was_looked_at():
    corpora = [corpus("general", 0.001, 0.01), corpus("math", -0.2, 0.02)]
    one = summary(CONFIG, corpora, [task("math", -0.05, 0.01), task("code", 0.01, 0.0099)])
    assert one == (
        "Loss fell on math (-0.20) nats per token; general text keeps 90% of its top-5 latents, "
        "math the most (IDR -5.0%)."
    )
    alone = summary(CONFIG, corpora, [task("code", 0.01, 0.0099)])
    assert "code the fewest (IDR +1.0%)" in alone
    quiet = summary(CONFIG, [corpus("general", 0.0, 0.01)], [task("code", 0.001, 0.01)])
    assert "no loss changed" in quiet.lower() and "no task differs" in quiet
