"""Training: against loops written by hand, resumed, spoilt by NaN, thinned out, and through every trainer."""

from __future__ import annotations

import gc
import json
import math
import warnings
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from palimpsest.dictionaries import Dictionary
from palimpsest.errors import ConfigError, NumericsError
from palimpsest.models import load_model
from palimpsest.options import CorpusOptions, ModelOptions, RunOptions
from palimpsest.tune.adapter import latent_layers
from palimpsest.tune.config import AdapterOptions, LogOptions, ObjectiveOptions, ScheduleOptions, TuneConfig
from palimpsest.tune.data import load_data
from palimpsest.tune.objectives import make_trainer
from palimpsest.tune.objectives.arguments import arguments
from palimpsest.tune.objectives.rewards import load_reward
from palimpsest.tune.objectives.text import Padding
from palimpsest.tune.penalties import kept, penalty
from palimpsest.tune.prepare import attach, check_options, read_latents, refuse_parts
from palimpsest.tune.run import measure, run_tune, train
from palimpsest.tune.training import Guard, hushed, newest_checkpoint, restore, still

LATENTS, D_MODEL = 64, 32
WORDS = ["the", "river", "runs", "past", "a", "mill", "counts", "seven", "sacks", "of", "flour", "pears"]


def rows_of(kind, n=24):
    for i in range(n):
        a, b, c = (WORDS[(i * k + k) % len(WORDS)] for k in (1, 2, 3))
        asked = {"prompt": f"{a} {b} {c} and"}
        yield {
            "text": {"text": " ".join(WORDS[(i + j) % len(WORDS)] for j in range(4 + i % 5))},
            "pairs": asked | {"chosen": f" {b} {c} {a}", "rejected": f" {c}" * (1 + i % 3)},
            "verdicts": asked | {"completion": f" {c} {a}", "label": i % 3 > 0},
            "prompts": asked,
        }[kind]


@pytest.fixture(scope="module", autouse=True)
def _light_collections():
    """Each training collects garbage; the thousands of objects of the libraries need no look every time."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="module")
def place(tmp_path_factory, tiny_llama):
    """A base, a dictionary for each layer, and rows of every kind."""
    root = tmp_path_factory.mktemp("tn-training")
    for layer in (0, 1):
        torch.manual_seed(layer)
        made = Dictionary(D_MODEL, LATENTS, k=6, metadata={"site": f"resid_post.{layer}"})
        made.save_pretrained(root / f"sae{layer}")
    for kind in ("text", "pairs", "verdicts", "prompts"):
        (root / f"{kind}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows_of(kind)))
    return SimpleNamespace(root=root, base=str(tiny_llama()))


FILES = {"sft": "text", "unlearn": "text", "kto": "verdicts", "grpo": "prompts"}


@pytest.fixture
def configure(place, tmp_path):
    """A function that makes a run's config from a few words."""

    def make(objective="sft", *, out="tn-out", layers=(1,), adapter=None, run=None, log=None, **schedule):
        more = {"retain": (str(place.root / "text.jsonl"),)} if objective == "unlearn" else {}
        if objective == "grpo":
            more = {"reward": "test_tune_rewards:letters", "completion_length": 4, "generations": 2}
        data = place.root / f"{FILES.get(objective, 'pairs')}.jsonl"
        return TuneConfig(
            place.base,
            run=RunOptions(out=tmp_path / out, **(run or {})),
            dictionary=tuple(str(place.root / f"sae{layer}") for layer in layers),
            adapter=AdapterOptions(**(adapter or {})),
            objective=ObjectiveOptions(objective=objective, data=(str(data),), **more),
            schedule=ScheduleOptions(**({"steps": 4, "batch_size": 4, "warmup": 0.25} | schedule)),
            models=ModelOptions(device="cpu"),
            log=LogOptions(**({"log_every": 2} | (log or {}))),
            corpora=CorpusOptions(max_length=64),
        )

    return make


@pytest.fixture(autouse=True)
def _reward(monkeypatch):
    import sys

    fake = SimpleNamespace(
        letters=lambda prompts, completions: [float(len(one)) for one in completions],
        few=lambda completions: [1.0],
        nothing=3,
    )
    monkeypatch.setitem(sys.modules, "test_tune_rewards", fake)


LOADED = {}


def opened(config, *, fresh=False):
    """The base with a new adapter; the one before is taken off the same base, unless this one will be spoilt."""
    if fresh or config.model not in LOADED:
        LOADED[config.model] = load_model(config.model, config.models), None
    language, before = LOADED.pop(config.model)
    if before is not None:
        before.unload()
    model = attach(config, language)
    if not fresh:
        LOADED[config.model] = language, model
    return SimpleNamespace(language=language, data=load_data(config, language), model=model)


def weights(model):
    return {name: one.detach().clone() for name, one in model.named_parameters() if one.requires_grad}


def trained(config, callbacks=(), folder=None):
    """Train and return (run, weights by name)."""
    run = opened(config)
    run.result = train(
        config,
        run.model,
        run.language.tokenizer,
        run.data,
        folder or config.run.out / "checkpoints",
        callbacks,
    )
    run.weights = weights(run.model)
    return run


def by_hand(config, loss_of, order):
    """AdamW with linear warmup and decay over given batches, in a loop of its own."""
    run, schedule = opened(config), config.schedule
    parameters = [one for one in run.model.parameters() if one.requires_grad]
    optimiser = torch.optim.AdamW(parameters, lr=1.0, weight_decay=0.0)
    warmup = int(schedule.warmup * schedule.steps)
    for step, batch in enumerate(order):
        rise = step / max(1, warmup) if step < warmup else (schedule.steps - step) / (schedule.steps - warmup)
        optimiser.param_groups[0]["lr"] = config.lr * rise
        optimiser.zero_grad()
        loss_of(run.model, [run.data.train[i] for i in batch]).backward()
        torch.nn.utils.clip_grad_norm_(parameters, schedule.clip)
        optimiser.step()
    return weights(run.model)


def batches_of(config):
    """Places of the rows of each step, as transformers' sampler draws them."""
    run = opened(config)
    seen = []

    class Recorded(Padding):
        def __call__(self, rows):
            seen.append([run.data.train.index(row) for row in rows])
            return super().__call__(rows)

    with hushed():
        trainer = make_trainer(config, run.model, run.language.tokenizer, run.data, config.run.out / "order")
        trainer.data_collator = Recorded(0)
        trainer.train()
    size = config.schedule.accumulate
    return [sum(seen[i : i + size], []) for i in range(0, config.schedule.steps * size, size)]


def cross_entropy(model, rows):
    """Mean over all labelled tokens of the rows, one row at a time."""
    total, count = 0.0, 0
    for row in rows:
        logits = model(input_ids=torch.tensor([row.input_ids])).logits[0]
        labels = torch.tensor(row.labels)[1:]
        total = total + F.cross_entropy(logits[:-1], labels, ignore_index=-100, reduction="sum")
        count += int((labels != -100).sum())
    return total / count


@pytest.mark.parametrize("accumulate", [1, 2])
def test_sft_is_a_plain_loop_of_adamw(configure, accumulate):
    config = configure(accumulate=accumulate, batch_size=3, layers=(0, 1))
    expected = by_hand(config, cross_entropy, batches_of(config))
    found = trained(config).weights
    assert found.keys() == expected.keys()
    assert len(found) == 2
    for name in found:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-3, atol=2e-5)
        assert found[name].abs().max() > 1e-2


def sequence_logp(model, row, *, base=False):
    ids = torch.tensor([row.input_ids])
    with torch.set_grad_enabled(not base), model.disable_adapter() if base else nullcontext():
        logp = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
    labels = torch.tensor(row.labels)[1:]
    return sum(logp[t, labels[t]] for t in range(len(labels)) if labels[t] != -100)


def test_unlearning_is_the_papers_loss(configure):
    config = configure("unlearn")
    run = opened(config)
    with hushed():
        trainer = make_trainer(config, run.model, run.language.tokenizer, run.data, config.run.out)
    with torch.no_grad():
        latent_layers(run.model)[0].component().weight.normal_(std=0.3)
    forget, retain = run.data.train[:3], run.data.retain[4:7]
    found = trainer.compute_loss(run.model, Padding(0)(list(zip(forget, retain, strict=True))))
    ratios = [sequence_logp(run.model, row) - sequence_logp(run.model, row, base=True) for row in forget]
    npo = sum(-2 / 0.1 * F.logsigmoid(-0.1 * ratio) for ratio in ratios) / len(forget)
    expected = npo + cross_entropy(run.model, retain)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    found.backward()
    gradient = latent_layers(run.model)[0].component().weight.grad.clone()
    run.model.zero_grad()
    expected.backward()
    torch.testing.assert_close(
        latent_layers(run.model)[0].component().weight.grad, gradient, rtol=1e-3, atol=1e-4
    )


OBJECTIVES = ("sft", "unlearn", "dpo", "kto", "orpo", "simpo", "grpo")


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_every_objective_trains_the_adapter_alone_and_evaluates(
    configure, objective, capfd, recwarn, monkeypatch
):
    def told(*args, **kwargs):
        raise AssertionError("trl tells its makers about the run")

    monkeypatch.setattr("trl.trainer.base_trainer.send_telemetry", told)
    config = configure(objective, eval_every=2, layers=(0,))
    run = opened(config)
    base = {name: one.detach().clone() for name, one in run.language.model.named_parameters()}
    with hushed():
        trainer = make_trainer(config, run.model, run.language.tokenizer, run.data, config.run.out)
        assert list(run.model.peft_config) == ["default"]
        trainer.train()
        restore(trainer)
    moved = {name for name, one in run.language.model.named_parameters() if not torch.equal(one, base[name])}
    assert len(moved) == 1
    assert next(iter(moved)).endswith("latent_components.default.weight")
    assert [row["step"] for row in trainer.state.log_history if "eval_loss" in row] == [2, 4]
    first = next(row["eval_loss"] for row in trainer.state.log_history if "eval_loss" in row)
    assert first == first
    assert capfd.readouterr() == ("", "")
    assert not [one for one in recwarn if "palimpsest" not in str(one.filename)]
    assert "forward" not in run.language.model.__dict__


@pytest.mark.parametrize("objective", ["dpo", "kto", "orpo", "simpo"])
def test_trl_trains_on_our_tokens(configure, objective):
    config = configure(objective)
    run = opened(config)
    with hushed():
        trainer = make_trainer(config, run.model, run.language.tokenizer, run.data, config.run.out)
    batch = next(iter(trainer.get_train_dataloader()))
    ids = batch["input_ids"] if "input_ids" in batch else batch["chosen_input_ids"]
    real = {tuple(row[row != run.language.tokenizer.pad_token_id].tolist()) for row in ids}
    rows = run.data.train
    if objective == "kto":
        expected = {tuple(row.prompt + row.answer) for row in rows}
    else:
        expected = {tuple(row.prompt + one) for row in rows for one in (row.chosen, row.rejected)}
    assert real <= expected
    assert all(row[0] == run.language.tokenizer.bos_token_id for row in real)


def test_a_new_adapter_starts_at_its_reference(configure):
    config = configure("dpo")
    run = opened(config)
    with hushed():
        trainer = make_trainer(config, run.model, run.language.tokenizer, run.data, config.run.out)
        run.model.eval()
        batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
        loss = trainer.compute_loss(run.model, batch)
    assert loss.item() == pytest.approx(0.6931471805599453, abs=1e-7)
    assert trainer._metrics["eval"]["rewards/margins"] == [0.0]


class Interrupt:
    """A callback that stops the process, as Ctrl-C does, after a step."""

    def __init__(self, step):
        from transformers import TrainerCallback

        class Stop(TrainerCallback):
            def on_step_end(self, args, state, control, **kwargs):
                if state.global_step == step:
                    raise KeyboardInterrupt

        self.callback = Stop()


@pytest.mark.parametrize(
    ("objective", "component"),
    [("sft", "low-rank"), ("dpo", "scale"), ("kto", "scale"), ("grpo", "scale")],
)
def test_a_resumed_run_gives_the_same_bits(configure, objective, component):
    # 22 rows in batches of 4 with 2 passes a step: the checkpoint falls into the second epoch.
    options = {
        "adapter": {"component": component},
        "steps": 6,
        "accumulate": 2,
        "save_every": 2,
        "top_n": None,
    }
    whole = trained(configure(objective, out="tn-whole", **options)).weights
    config = configure(objective, out="tn-broken", **options)
    with pytest.raises(KeyboardInterrupt):
        trained(config, [Interrupt(5).callback])
    checkpoint = newest_checkpoint(config.run.out / "checkpoints")
    assert checkpoint.name == "checkpoint-4"
    # One that was cut short counts for nothing.
    (checkpoint.parent / "checkpoint-5").mkdir()
    resumed = trained(replace(config, run=replace(config.run, resume=True))).weights
    for name in whole:
        assert torch.equal(whole[name], resumed[name]), name
        assert whole[name].abs().max() > 0
    again = trained(configure(objective, out="tn-seed", run={"seed": 5}, **options)).weights
    assert not all(torch.equal(whole[name], again[name]) for name in whole)


def poison(config, run):
    """Make the model give NaN on a word of one row that the second epoch or a late batch brings."""
    token = run.language.tokenizer("zz", add_special_tokens=False)["input_ids"][0]
    with torch.no_grad():
        run.language.model.get_input_embeddings().weight[token] = float("nan")
    return token


def test_nan_leaves_the_adapter_of_the_last_good_step(configure):
    config = configure(steps=8, log={"log_every": 4})
    order = batches_of(config)
    run = opened(config, fresh=True)
    token = poison(config, run)
    bad_step = 4
    row = order[bad_step - 1][0]
    assert not any(row in batch for batch in order[: bad_step - 1])
    run.data.train[row].input_ids[-1] = token
    steps = []

    from transformers import TrainerCallback

    class Snapshots(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            steps.append(weights(kwargs["model"]))

    result = train(config, run.model, run.language.tokenizer, run.data, config.run.out, [Snapshots()])
    # The loss of step 4 speaks against the parameters that step 3 left.
    assert result.steps == bad_step - 2
    assert result.stopped == f"the loss or its gradient was not finite at step {bad_step}"
    assert len(steps) == 4  # It ended at the first entry of the log behind the fault.
    for name, one in weights(run.model).items():
        assert torch.equal(one, steps[bad_step - 3][name])
        assert not torch.equal(one, steps[bad_step - 4][name])
    assert newest_checkpoint(config.run.out).name == "checkpoint-2"


def test_a_blow_up_ends_with_an_adapter_that_works(configure):
    from transformers import TrainerCallback

    config = configure(
        adapter={"transform": "exp"}, steps=60, lr=60.0, warmup=0, log={"log_every": 60}, save_every=60
    )
    seen = []

    class Count(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            seen.append(state.global_step)

    run = opened(config, fresh=True)
    result = train(config, run.model, run.language.tokenizer, run.data, config.run.out, [Count()])
    assert result.stopped is not None
    assert seen[-1] == 25
    assert math.isfinite(measure(config, run.language, run.data).measure(run.model).value)


def test_the_guard_knows_which_step_was_bad(configure, tmp_path):
    def played(losses, gradients):
        weight = torch.nn.Parameter(torch.zeros(1))
        guard = Guard([weight], configure())
        for step, (loss, gradient) in enumerate(zip(losses, gradients, strict=True)):
            state = SimpleNamespace(global_step=step)
            guard.on_step_begin(None, state, None)
            guard.watch(torch.tensor(loss))
            weight.grad = torch.tensor([gradient])
            guard.on_pre_optimizer_step(None, state, None)
            with torch.no_grad():
                weight += 1 + weight.grad
            guard.on_optimizer_step(None, state, None, model=None)
        return guard, weight.item()

    bad = float("nan")
    guard, weight = played([1.0, 1.0, bad, 1.0], [0.0] * 4)
    assert (guard.fault, guard.steps, weight) == (3, 1, 1.0)
    guard, weight = played([1.0] * 4, [0.0, 0.0, bad, 0.0])
    assert (guard.fault, guard.steps, weight) == (3, 2, 2.0)
    guard, weight = played([bad, 1.0], [0.0] * 2)
    assert (guard.fault, guard.steps, weight) == (1, 0, 0.0)
    guard, weight = played([1.0, 1.0], [0.0] * 2)
    assert (guard.fault, weight) == (None, 2.0)
    guard.save(tmp_path)
    # A run that goes on from here and fails at once has the step before the checkpoint.
    other = torch.nn.Parameter(torch.full((1,), 2.0))
    again, state = Guard([other], configure()), SimpleNamespace(global_step=2)
    again.load(tmp_path)
    again.on_step_begin(None, state, None)
    again.watch(torch.tensor(bad))
    again.on_pre_optimizer_step(None, state, None)
    again.on_optimizer_step(None, state, None, model=None)
    assert (again.fault, again.steps, other.item()) == (3, 1, 1.0)


def test_nan_in_a_run_is_raised_when_all_is_saved(configure, place, tmp_path):
    from transformers import AutoModelForCausalLM

    config = configure(steps=4, out="tn-nan")
    order = batches_of(replace(config, run=replace(config.run, out=tmp_path / "tn-order")))
    run = opened(config, fresh=True)
    # The row of the third step alone holds a word that the base gives NaN on.
    text = [json.loads(line) for line in (place.root / "text.jsonl").read_text().splitlines()]
    chosen = run.data.train[order[2][0]].input_ids
    ids = run.language.tokenizer
    spoilt = [
        {"text": row["text"] + " zz"} if ids(row["text"])["input_ids"] == chosen[1:] else row for row in text
    ]
    (tmp_path / "tn-spoilt.jsonl").write_text("".join(json.dumps(row) + "\n" for row in spoilt))
    model = AutoModelForCausalLM.from_pretrained(place.base)
    run.language.model = model
    poison(config, SimpleNamespace(language=run.language))
    model.save_pretrained(tmp_path / "tn-base")
    ids.save_pretrained(tmp_path / "tn-base")
    objective = replace(config.objective, data=(str(tmp_path / "tn-spoilt.jsonl"),))
    config = replace(config, model=str(tmp_path / "tn-base"), objective=objective)
    for resume in (False, True):
        again = replace(config, run=replace(config.run, resume=resume))
        with pytest.raises(NumericsError, match="not finite at step"):
            run_tune(again)
    result = json.loads((config.run.out / "tune.json").read_text())
    assert result["stopped"].startswith("the loss or its gradient was not finite")
    assert result["steps"] == int(result["stopped"].split()[-1]) - 2
    assert json.loads((config.run.out / "manifest.json").read_text())["status"] == "complete"


def test_penalties_are_the_sums_they_say(configure):
    config = configure(layers=(0, 1), adapter={"component": "gate"})
    model = opened(config).model
    expected = 0.0
    with torch.no_grad():
        for layer in latent_layers(model):
            for parameter in layer.component().parameters():
                parameter.normal_()
            weight, bias = layer.component().weight, layer.component().bias
            lengths = (weight.square().sum(1) + bias.square()).sqrt()
            norms = layer.dictionary.W_dec[:, 0].norm(dim=1)
            expected += 0.3 * (lengths * norms).sum() + 0.7 * lengths.square().sum().sqrt()
    torch.testing.assert_close(penalty(model, 0.3, 0.7), expected)
    assert penalty(model, 0.0, 0.0) == 0


def test_nothing_costs_nothing_and_pulls_nowhere(configure):
    for component in ("scale", "low-rank"):
        model = opened(configure(adapter={"component": component})).model
        penalty(model, 1.0, 1.0).backward()
        weight = latent_layers(model)[0].component().weight
        assert (weight.grad == 0).all()


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_penalty_is_taken_once_a_step_in_the_gradient(configure, accumulate):
    """The gradient that the optimiser sees is that of the objective plus that of the penalty."""
    from transformers import TrainerCallback

    def gradients(l1):
        seen = []

        class Look(TrainerCallback):
            def on_pre_optimizer_step(self, args, state, control, **kwargs):
                seen.append(latent_layers(kwargs["model"])[0].component().weight.grad.clone())

        config = configure(steps=1, warmup=0, l1=l1, accumulate=accumulate, clip=1e9, out=f"tn-{l1}")
        run = opened(config)
        with torch.no_grad():
            latent_layers(run.model)[0].component().weight.fill_(-0.1)
        train(config, run.model, run.language.tokenizer, run.data, config.run.out, [Look()])
        return seen[0], latent_layers(run.model)[0].dictionary.W_dec[:, 0].norm(dim=1)

    (plain, norms), (with_l1, _) = gradients(0.0), gradients(0.5)
    torch.testing.assert_close(with_l1 - plain, -0.5 * norms, rtol=1e-4, atol=1e-5)


def test_top_n_leaves_exactly_n_at_each_site(configure):
    config = configure(steps=10, top_n=5, layers=(0, 1), warmup=0)
    counts = []

    from transformers import TrainerCallback

    class Count(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            found = [layer.component() for layer in latent_layers(kwargs["model"])]
            counts.append([int((one.weight != 0).sum()) for one in found])

    trained(config, [Count()])
    assert all(a <= kept(step, 10, LATENTS, 5) for step, row in enumerate(counts, 1) for a in row)
    assert counts[4:] == [[5, 5]] * 6
    assert counts[0][0] > 5


def test_the_schedule_of_top_n_is_geometric():
    found = [kept(step, 20, 1000, 10) for step in range(21)]
    assert found[0] == 1000
    assert found[5] == 100
    assert found[10:] == [10] * 11
    assert kept(1, 1, 50, 7) == 7
    assert kept(3, 20, 5, 9) == 5


def test_weight_decay_reaches_all_that_is_trained(configure):
    config = configure(adapter={"component": "gate"}, weight_decay=0.5)
    run = opened(config)
    with hushed():
        trainer = make_trainer(config, run.model, run.language.tokenizer, run.data, config.run.out)
        optimiser = trainer.create_optimizer()
    decayed = sum(len(group["params"]) for group in optimiser.param_groups if group["weight_decay"] == 0.5)
    assert decayed == len(weights(run.model)) == 3


@pytest.mark.parametrize("objective", ["sft", "dpo"])
def test_checkpointed_gradients_are_the_same_and_end_below_the_adapter(configure, objective):
    plain = trained(configure(objective, out="tn-plain")).weights
    config = configure(objective, out="tn-again", gradient_checkpointing=True)
    run = opened(config, fresh=True)
    inner, reached = run.language.model.model, []
    places = {"above": inner.norm, "below": inner.layers[0].mlp, "embedding": inner.embed_tokens}
    for name, module in places.items():
        module.register_full_backward_hook(lambda *_, name=name: reached.append(name))
    train(config, run.model, run.language.tokenizer, run.data, config.run.out)
    assert set(reached) == {"above"}
    for name, one in weights(run.model).items():
        torch.testing.assert_close(one, plain[name], rtol=1e-5, atol=1e-6)


def test_mixed_precision_trains_and_leaves_the_model_as_it_was(configure):
    config = configure(precision="bfloat16", layers=(0,))
    run = opened(config)
    ids = torch.tensor([run.data.train[0].input_ids])
    with torch.no_grad(), run.model.disable_adapter():
        before = run.model(input_ids=ids).logits
    train(config, run.model, run.language.tokenizer, run.data, config.run.out)
    with torch.no_grad(), run.model.disable_adapter():
        after = run.model(input_ids=ids).logits
    assert torch.equal(before, after)
    for one in weights(run.model).values():
        assert one.dtype == torch.float32
        assert one.abs().max() > 1e-2


@pytest.mark.parametrize("objective", ["dpo", "orpo", "kto"])
def test_a_scope_edits_the_answers_of_pairs_alone(configure, objective):
    config = configure(objective, adapter={"scope": "answer", "skip_special": "none"}, steps=1)
    run = opened(config)
    seen = []
    for layer in latent_layers(run.model):
        layer.watchers.append(lambda one, call=layer.call: seen.append((one.edited, call.ids)))
    train(config, run.model, run.language.tokenizer, run.data, config.run.out)
    rows = run.data.train
    if objective == "kto":
        answers = {tuple(row.prompt + other.answer): len(row.prompt) for row in rows for other in rows}
    else:
        answers = {tuple(row.prompt + a): len(row.prompt) for row in rows for a in (row.chosen, row.rejected)}
    pad = run.language.tokenizer.pad_token_id
    assert seen
    for edited, ids in seen:
        for mask, row in zip(edited.view(ids.shape), ids, strict=True):
            real = row[row != pad].tolist()
            prompt = answers[tuple(real)]
            assert mask.tolist() == [prompt <= t < len(real) for t in range(len(row))]


def test_lora_trains_beside_it(configure):
    run = trained(configure("dpo", adapter={"component": "lora", "rank": 2}))
    config = run.model.peft_config["default"]
    assert config.r == 2
    assert any("lora_B" in name and one.abs().max() > 0 for name, one in run.weights.items())
    assert all("layers" in name for name in run.weights)


def test_a_run_reuses_a_loaded_base_and_leaves_it_alone(configure):
    config = configure(out="tn-reuse")
    language = load_model(config.model, config.models)
    names = [name for name, _ in language.model.named_modules()]
    ids = torch.tensor([[5, 6, 7]])
    before = language.model(ids).logits
    attention = language.model.model.layers[0].self_attn
    attention.attention_dropout = 0.25
    run_tune(config, language)
    assert attention.attention_dropout == 0.25
    assert torch.equal(language.model(ids).logits, before)
    assert [name for name, _ in language.model.named_modules()] == names


def test_dropout_is_off_in_the_block_only():
    model = torch.nn.Sequential(torch.nn.Dropout(0.3), torch.nn.Linear(2, 2))
    model[1].attention_dropout = 0.2
    with pytest.raises(KeyboardInterrupt), still(model):
        assert (model[0].p, model[1].attention_dropout) == (0.0, 0.0)
        raise KeyboardInterrupt
    assert (model[0].p, model[1].attention_dropout) == (0.3, 0.2)


@pytest.mark.parametrize("scope", ["all", "first", "answer"])
def test_general_text_is_read_plainly_where_the_scope_allows(configure, place, caplog, scope):
    config = configure("dpo", out=f"tn-{scope}", layers=(0,), adapter={"scope": scope}, lr=0.3)
    general = (str(place.root / "text.jsonl"),)
    with caplog.at_level("WARNING", "palimpsest"):
        run_tune(replace(config, objective=replace(config.objective, general=general)))
    result = json.loads((config.run.out / "tune.json").read_text())
    assert result["objective_value"]["difference"] != 0
    if scope == "answer":
        assert result["general"] is None
        assert "does not say which" in result["notes"][-1]
        assert "nothing is measured with --scope answer" in caplog.text
    else:
        assert result["general"]["kl"] > 1e-4
        assert not any("does not say which" in note for note in result["notes"])


@pytest.mark.parametrize("on", [False, True])
def test_trainers_are_told_nothing_deprecated(configure, on):
    from transformers import TrainingArguments

    config = configure(gradient_checkpointing=on)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made = TrainingArguments(**arguments(config, torch.nn.Linear(2, 2), config.run.out))
    assert made.gradient_checkpointing is on


def test_a_reward_that_fails_is_named(configure, tmp_path, monkeypatch):
    (tmp_path / "tn_broken_reward.py").write_text("raise RuntimeError('no key')\n")
    (tmp_path / "tn_raising_reward.py").write_text("def f(completions):\n    return completions[9]\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match=r"tn_raising_reward:f failed.*IndexError"):
        load_reward("tn_raising_reward:f")(prompts=["a"], completions=["b"])
    config = configure("grpo", out="tn-unclaimed")
    broken = replace(config.objective, reward="tn_broken_reward:f")
    with pytest.raises(ConfigError, match=r"tn_broken_reward:f cannot be imported.*RuntimeError: no key"):
        run_tune(replace(config, objective=broken))
    assert not config.run.out.exists()


def test_rewards_are_imported_and_checked():
    assert load_reward("test_tune_rewards:letters")(prompts=["a"], completions=["abc"], extra=[1]) == [3.0]
    with pytest.raises(ConfigError, match="does not give one number for each"):
        load_reward("test_tune_rewards:few")(prompts=["a", "b"], completions=["a", "b"])
    for name in ("test_tune_rewards:absent", "no_such_module_of_ours:f"):
        with pytest.raises(ConfigError, match="cannot be imported"):
            load_reward(name)
    with pytest.raises(ConfigError, match="is no function"):
        load_reward("test_tune_rewards:nothing")


def test_trl_is_named_where_it_lacks(configure, monkeypatch, tmp_path):
    import importlib.util

    from palimpsest.tune import objectives

    run = opened(configure("dpo"))
    monkeypatch.setattr(objectives, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"palimpsest-lm\[trl\]"):
        make_trainer(configure("dpo"), run.model, run.language.tokenizer, run.data, tmp_path)
    assert importlib.util.find_spec("trl") is not None


def test_batches_that_an_objective_cannot_use_are_refused(configure):
    for objective, schedule, words in (
        ("kto", {"batch_size": 1}, "at least 2"),
        ("grpo", {"batch_size": 3}, "a multiple of it"),
        ("grpo", {"batch_size": 200}, "fewer prompts"),
    ):
        config = configure(objective, **schedule)
        run = opened(config)
        with pytest.raises(ConfigError, match=words):
            make_trainer(config, run.model, run.language.tokenizer, run.data, config.run.out)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"is_loaded_in_4bit": True}, "is quantised.*4 bits"),
        ({"quantization_method": "gptq"}, "is quantised.*gptq"),
        ({"hf_device_map": {"a": 0, "b": "cpu"}}, "several devices.*cpu, cuda:0"),
        ({"hf_device_map": {"a": "disk"}}, "several devices.*disk"),
    ],
)
def test_bases_that_are_no_whole_are_refused(fields, words):
    model = torch.nn.Linear(2, 2)
    for name, value in fields.items():
        object.__setattr__(model, name, value)
    with pytest.raises(ConfigError, match=words):
        refuse_parts(model, "base")
    with pytest.raises(ConfigError, match="meta"):
        refuse_parts(torch.nn.Linear(2, 2, device="meta"), "base")
    refuse_parts(torch.nn.Linear(2, 2), "base")


def test_lists_of_latents(configure, tmp_path):
    language = load_model(configure().model, ModelOptions(device="cpu"))
    path = tmp_path / "tn-latents.txt"
    path.write_text("3\n\n 17 # a comment\n")

    def read(*given, dictionaries=1):
        return read_latents(given, "--latents", dictionaries, language)

    assert read() is None
    assert read("5", "3", str(path)) == [5, 3, 3, 17]
    assert read(f"resid_post.0={path}", "resid_post.1=4", dictionaries=2) == {
        "resid_post.0": [3, 17],
        "resid_post.1": [4],
    }
    with pytest.raises(ConfigError, match="not clear which site"):
        read("5", dictionaries=2)
    with pytest.raises(ConfigError, match="neither a latent nor a file"):
        read("tn-none.txt")
    path.write_text("3\nx\n")
    with pytest.raises(ConfigError, match="line 2: 'x'"):
        read(str(path))


def test_only_listed_latents_move(configure):
    found = trained(configure(adapter={"latents": tuple(map(str, range(0, 40))), "forbid": ("7",)}))
    component = latent_layers(found.model)[0].component()
    assert component.latents.tolist() == [one for one in range(40) if one != 7]


@pytest.mark.parametrize("component", ["lora", "vector"])
def test_options_of_latents_are_refused_where_there_are_none(configure, component):
    for more in ({"l1": 0.1}, {"top_n": 3}):
        with pytest.raises(ConfigError, match="would do nothing"):
            check_options(configure(adapter={"component": component}, **more))
    check_options(configure(adapter={"component": component}))


def test_a_run_that_moves_nothing_is_warned_about(configure, caplog):
    with caplog.at_level("WARNING", "palimpsest"):
        opened(configure(lr=1e-5))
        assert "at most about lr x steps / 2 = 2e-05" in caplog.text
        caplog.clear()
        opened(configure())
    assert caplog.text == ""


def test_the_card_says_what_latents_stand_for_where_that_is_known(configure, tmp_path, monkeypatch):
    config = configure(out="tn-words")
    labels = {"resid_post.1": {str(latent): f"mills *number* {latent}" for latent in range(4096)}}
    (tmp_path / "palimpsest").mkdir()
    (tmp_path / "palimpsest" / "labels.json").write_text(json.dumps(labels))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    card = (run_tune(config).path / "README.md").read_text()
    assert "mills" in card
    assert card.count("mills") == 20
