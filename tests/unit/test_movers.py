"""What is logged of latents while training, against a plain account of the same steps."""

from __future__ import annotations

import io
import json
import sys
from types import SimpleNamespace

import pyarrow.parquet as pq
import pytest
import torch

from audit_world import make_dictionary
from pair_fixture import load_hf, lora
from palimpsest.artifacts import RunFolder
from palimpsest.dictionaries import load_dictionary
from palimpsest.tune.adapter import LatentConfig, latent_layers
from palimpsest.tune.config import LogOptions
from palimpsest.tune.mover_table import BARS, SHOWN, Mover, MoverTable, sparkline
from palimpsest.tune.movers import Movers

STEPS, BATCH, PASSES = 6, 2, 2
SITES = ("resid_post.0", "mlp_out.1")


@pytest.fixture(scope="module")
def dictionary(tmp_path_factory):
    return make_dictionary(tmp_path_factory.mktemp("dictionary") / "d", "relu")


@pytest.fixture
def folder(tmp_path):
    with RunFolder(tmp_path / "run", stage="tune", config={}) as run:
        yield run


def rows():
    generator = torch.Generator().manual_seed(4)
    made = []
    for place in range(STEPS * BATCH * PASSES):
        length = 4 + place % 5
        ids = torch.randint(3, 300, (length,), generator=generator).tolist()
        made.append(
            {"input_ids": ids + [0] * (9 - length), "attention_mask": [1] * length + [0] * (9 - length)}
        )
    return [row | {"labels": [i if m else -100 for i, m in zip(*row.values(), strict=True)]} for row in made]


def adapted(tiny_llama, dictionary, component="scale", **changes):
    from peft import get_peft_model

    hooks = [(dictionary, site) for site in SITES]
    # No id is left alone: only the attention mask says what padding is.
    fields = {"component": component, "skip_ids": []} | changes
    return get_peft_model(load_hf(tiny_llama()), LatentConfig(target_hooks=hooks, **fields))


def trainer(model, folder, *callbacks, **changes):
    from transformers import PrinterCallback, Trainer, TrainingArguments

    arguments = {
        "output_dir": str(folder.part("checkpoints")),
        "max_steps": STEPS,
        "per_device_train_batch_size": BATCH,
        "gradient_accumulation_steps": PASSES,
        "learning_rate": 0.03,
        "lr_scheduler_type": "constant",
        "logging_steps": 2,
        "report_to": [],
        "disable_tqdm": True,
        "save_strategy": "no",
        "remove_unused_columns": False,
        "use_cpu": True,
        "dataloader_pin_memory": False,
        "train_sampling_strategy": "sequential",
    }
    made = Trainer(model=model, args=TrainingArguments(**arguments | changes), train_dataset=rows())
    made.remove_callback(PrinterCallback)
    for callback in callbacks:
        made.add_callback(callback)
    return made


class Account:
    """Values after each step, gradients before it and firings during it, written down densely."""

    def __new__(cls, model):
        from transformers import TrainerCallback

        account = SimpleNamespace(values={}, gradients={}, firings={})
        components = {layer.site: layer.components["default"] for layer in latent_layers(model)}
        counts = {layer.site: torch.zeros(96, dtype=torch.long) for layer in latent_layers(model)}

        def watch(layer):
            def hook(module, _args, output):
                if not torch.is_grad_enabled():
                    return
                hidden = output[0] if isinstance(output, tuple) else output
                mask = layer.call.mask.bool()
                dense = layer.dictionary.encode(hidden.detach()[mask]).dense()
                counts[layer.site] += (dense > 0).sum(0)

            layer.base_layer.register_forward_hook(hook)

        for layer in latent_layers(model):
            watch(layer)

        class Callback(TrainerCallback):
            def on_pre_optimizer_step(self, args, state, control, **_):
                account.gradients[state.global_step + 1] = {
                    site: one.weight.grad.clone() for site, one in components.items()
                }

            def on_step_end(self, args, state, control, **_):
                step = state.global_step
                account.values[step] = {
                    site: one.values().detach().clone() for site, one in components.items()
                }
                account.firings[step] = {site: one.clone() for site, one in counts.items()}

        account.callback = Callback()
        return account


def run(model, folder, options, *more, resume=None, stop_at=None, **changes):
    with Movers(folder, latent_layers(model), options, steps=STEPS) as movers:
        made = trainer(model, folder, *more, movers, **changes)
        made.train(resume_from_checkpoint=resume)
        if stop_at is None:
            movers.write(made.state.global_step)
    return movers


def table(folder):
    return pq.read_table(folder.path / "latents.parquet").to_pylist()


def test_all_latents_equal_a_plain_account(tiny_llama, dictionary, folder):
    model = adapted(tiny_llama, dictionary)
    account = Account(model)
    run(model, folder, LogOptions(log_every=2, log_latents="all"), account.callback)
    found = table(folder)
    assert sorted({row["step"] for row in found}) == [2, 4, 6]
    assert len(found) == 3 * 2 * 96
    by = {(row["step"], row["site"], row["latent"]): row for row in found}
    fired = 0
    for (step, site, latent), row in by.items():
        assert row["value"] == account.values[step][site][latent].item()
        assert row["gradient"] == account.gradients[step][site][latent].item()
        before = account.firings[step - 2][site][latent].item() if step > 2 else 0
        assert row["firings"] == account.firings[step][site][latent].item() - before
        fired += row["firings"]
    assert fired > 100
    steps = [row["step"] for row in found]
    assert steps == sorted(steps)


def test_the_strongest_latents_are_by_value_times_decoder_norm(tiny_llama, dictionary, folder, tmp_path):
    stretched = load_dictionary(dictionary)
    with torch.no_grad():
        stretched.W_dec.mul_(torch.linspace(0.1, 4, 96)[:, None, None])
    stretched.save_pretrained(tmp_path / "stretched")
    model = adapted(tiny_llama, str(tmp_path / "stretched"))
    account = Account(model)
    movers = run(model, folder, LogOptions(log_every=3, log_latents="7"), account.callback)
    found = table(folder)
    strength = torch.cat(
        [account.values[3][site].abs() * torch.linspace(0.1, 4, 96) for site in sorted(SITES, reverse=True)]
    )
    wanted = {(sorted(SITES, reverse=True)[i // 96], i % 96) for i in strength.topk(7).indices.tolist()}
    assert {(row["site"], row["latent"]) for row in found if row["step"] == 3} == wanted
    last = {(row["site"], row["latent"]) for row in found if row["step"] == STEPS}
    moved = {(s, i) for s in SITES for i in account.values[STEPS][s].nonzero()[:, 0].tolist()}
    assert last == moved
    far = [one for s in SITES for one in account.values[STEPS][s].abs().tolist() if one > 1e-3]
    assert len(last) >= len(far) == movers.moved() > 7


def test_a_hair_is_no_move(tiny_llama, dictionary, folder):
    model = adapted(tiny_llama, dictionary)
    weight = latent_layers(model)[0].component().weight
    with torch.no_grad():
        weight[:5] = torch.tensor([9e-4, -9e-4, 2e-3, -2e-3, float("nan")])
    with Movers(folder, latent_layers(model), LogOptions(), steps=STEPS) as movers:
        assert movers.moved() == 3


def test_latents_that_may_not_move_do_not_appear(tiny_llama, dictionary, folder):
    model = adapted(tiny_llama, dictionary, latents=[3, 5, 60])
    run(model, folder, LogOptions(log_every=2))
    assert {row["latent"] for row in table(folder)} == {3, 5, 60}


def test_components_without_codes_have_no_firings(tiny_llama, dictionary, folder):
    run(adapted(tiny_llama, dictionary, "bias"), folder, LogOptions(log_every=2))
    found = table(folder)
    assert {row["firings"] for row in found} == {None}
    assert all(row["gradient"] is not None for row in found)


def test_only_edited_tokens_count(tiny_llama, dictionary, folder):
    model = adapted(tiny_llama, dictionary, scope="answer", skip_ids=list(range(320)))
    run(model, folder, LogOptions(log_every=2, log_latents="all"))
    assert {row["firings"] for row in table(folder)} == {0}


def test_recomputed_layers_count_once(tiny_llama, dictionary, folder, tmp_path):
    run(adapted(tiny_llama, dictionary), folder, LogOptions(log_every=2, log_latents="all"))
    with RunFolder(tmp_path / "again", stage="tune", config={}) as other:
        model = adapted(tiny_llama, dictionary)
        run(model, other, LogOptions(log_every=2, log_latents="all"), activation_checkpointing=True)
        assert [row["firings"] for row in table(other)] == [row["firings"] for row in table(folder)]


class Killed(Exception):  # noqa: N818
    pass


def killer(step):
    from transformers import TrainerCallback

    class Callback(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            if state.global_step == step:
                raise Killed

    return Callback()


@pytest.mark.parametrize("log_every", [2, 4])
def test_an_interrupted_run_loses_and_repeats_nothing(tiny_llama, dictionary, tmp_path, log_every):
    options = LogOptions(log_every=log_every, log_latents="all")
    saving = {"save_strategy": "steps", "save_steps": 3, "logging_steps": log_every}
    tables, logs = [], []
    for name in ("whole", "broken"):
        with RunFolder(tmp_path / name, stage="tune", config={}) as out:
            if name == "broken":
                with pytest.raises(Killed):
                    run(adapted(tiny_llama, dictionary), out, options, killer(5), stop_at=5, **saving)
            resume = str(out.part("checkpoints") / "checkpoint-3") if name == "broken" else None
            run(adapted(tiny_llama, dictionary), out, options, resume=resume, **saving)
            tables.append(table(out))
            lines = (out.path / "log.jsonl").read_text().splitlines()
            logs.append([json.loads(line)["step"] for line in lines])
    assert tables[0] == tables[1]
    assert logs[0] == logs[1]
    assert len(tables[0]) == len({(r["step"], r["site"], r["latent"]) for r in tables[0]})


def test_weights_that_were_taken_back_take_their_entries_along(tiny_llama, dictionary, folder):
    model = adapted(tiny_llama, dictionary)
    with Movers(
        folder, latent_layers(model), LogOptions(log_every=2, log_latents="3"), steps=STEPS
    ) as movers:
        trainer(model, folder, movers, save_strategy="steps", save_steps=3).train()
        movers.write(3)
    found = table(folder)
    assert sorted({row["step"] for row in found}) == [2, 3]
    last = [row for row in found if row["step"] == 3]
    assert len(last) >= movers.moved()
    assert {row["gradient"] for row in last} == {None}


def test_an_adapter_without_latents_leaves_an_empty_table(tiny_llama, folder):
    from peft import get_peft_model

    run(get_peft_model(load_hf(tiny_llama()), lora()), folder, LogOptions(log_every=2))
    assert table(folder) == []
    reports = [json.loads(line) for line in (folder.path / "log.jsonl").read_text().splitlines()]
    assert [report["step"] for report in reports if "loss" in report] == [2, 4, 6]


def test_watchers_go_even_after_a_failure(tiny_llama, dictionary, folder):
    model = adapted(tiny_llama, dictionary)
    with pytest.raises(Killed):
        run(model, folder, LogOptions(log_every=2), killer(2))
    assert not any(layer.watchers for layer in latent_layers(model))


def test_trackers_get_the_loss_and_the_strongest_latents(tiny_llama, dictionary, folder, monkeypatch):
    sent = []
    tracked = SimpleNamespace(
        log=lambda figures, step: sent.append((step, figures)), finish=lambda: sent.append("end")
    )
    monkeypatch.setitem(sys.modules, "trackio", SimpleNamespace(init=lambda **_: tracked))
    run(adapted(tiny_llama, dictionary), folder, LogOptions(log_every=2, track=("trackio",), track_latents=3))
    assert sent[-1] == "end"
    step, figures = next(one for one in sent if one[0] == 4)
    series = {name: value for name, value in figures.items() if name.startswith("latents/")}
    assert len(series) == 3
    assert "loss" in figures
    rows = {f"latents/{r['site']}/{r['latent']}": r["value"] for r in table(folder) if r["step"] == 4}
    for name, value in series.items():
        assert value == pytest.approx(rows[name])


def test_the_terminal_table(monkeypatch):
    from rich.console import Console

    shown = MoverTable()
    for step in (1, 2, 3):
        shown.update(
            step, [Mover("resid_post.0", n, (n + 1) * step / 10, None, 5) for n in reversed(range(40))]
        )
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(shown.render())
    lines = console.export_text().splitlines()
    assert len([line for line in lines if "resid_post.0" in line]) == SHOWN
    first = next(line for line in lines if "resid_post.0" in line)
    assert first.split()[:3] == ["39", "resid_post.0", "+12.0000"]
    assert BARS[-1] in first


def test_sparklines():
    assert sparkline([0.0, 1.0]) == BARS[0] + BARS[-1]
    assert sparkline([-1.0, 0.0]) == BARS[0] + BARS[-1]
    assert sparkline([0.0, 0.0]) == BARS[0] * 2
    assert sparkline([float("nan"), 1.0]) == "x" + BARS[-1]
