"""trl's own ways with an adapter: a reference that is the base, and a copy of a trained adapter as the reference."""

from __future__ import annotations

import pytest
import torch

from latent_world import adapted, config, tiny
from palimpsest.tune.adapter import latent_layers

pytest.importorskip("trl")

ROWS = [
    {"prompt": "The river runs", "chosen": " past the old mill.", "rejected": " and runs and runs."},
    {"prompt": "Seven apples", "chosen": " and five pears.", "rejected": " are no apples at all."},
]


def arguments(folder, **changes):
    from trl import DPOConfig

    fields = {
        "output_dir": str(folder),
        "max_steps": 3,
        "per_device_train_batch_size": 2,
        "learning_rate": 0.05,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "gradient_checkpointing": False,
        "logging_steps": 1,
        "save_strategy": "no",
        "max_length": 48,
        "bf16": False,
    }
    return DPOConfig(**(fields | changes))


def trainer(model, folder, tokenizer, peft_config=None, **changes):
    import warnings

    from datasets import Dataset
    from trl import DPOTrainer

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return DPOTrainer(
            model=model,
            args=arguments(folder, **changes),
            train_dataset=Dataset.from_list(ROWS * 3),
            processing_class=tokenizer,
            peft_config=peft_config,
        )


@pytest.fixture
def base(tiny_tokenizer):
    model = tiny()
    model.resize_token_embeddings(len(tiny_tokenizer))
    return model


@pytest.mark.parametrize("kind", ["scale", "gate", "low-rank", "lerp"])
def test_the_reference_copy_of_a_trained_adapter_is_exact(kind, base, tiny_tokenizer, tmp_path):
    model = adapted(kind, base=base, move=0.3)
    made = trainer(model, tmp_path, tiny_tokenizer)
    wrapped = made.model
    layer = latent_layers(wrapped)[0]
    assert set(layer.components) == {"default", "ref"}
    own, reference = (dict(layer.components[name].named_parameters()) for name in ("default", "ref"))
    for name, value in own.items():
        assert torch.equal(value, reference[name]), name
    ids = torch.randint(3, 128, (2, 7))
    wrapped.eval()
    default = wrapped(input_ids=ids).logits
    wrapped.base_model.set_adapter("ref")
    assert torch.equal(wrapped(input_ids=ids).logits, default)


def test_the_first_loss_is_log_two_and_it_falls(base, tiny_tokenizer, tmp_path):
    made = trainer(base, tmp_path, tiny_tokenizer, peft_config=config("scale"), max_steps=12)
    made.train()
    losses = [one["loss"] for one in made.state.log_history if "loss" in one]
    assert losses[0] == pytest.approx(0.6931, abs=1e-3)
    assert losses[-1] < losses[0] - 0.01
