"""The peers, each driven the way its package documents. Imported where the package is installed.

What is given to peers beyond their defaults: fused Adam for eai-sparsify (its own trainer has none), activations
already in the scale their own pipelines bring them to, the shared schedule, the best learning rate of a sweep, and in
quality runs a threshold that starts early enough for the length of the run.
"""

from __future__ import annotations

import contextlib
import math
import tempfile
from typing import Any

import torch
from torch import Tensor

from throughput import contest
from throughput.clock import Clock
from throughput.fitted import Fitted, Weights
from throughput.recipe import DenseCrosscoder, DenseTrainer

Job = dict[str, Any]

LATE = 0.9
"""Share of a quality run after which a peer's inference threshold starts: its average then has no old values."""


def autocast(job: Job):
    """A context manager that can be entered again and again."""
    if job["dtype"] == "float32":
        return contextlib.nullcontext
    return lambda: torch.autocast(job["device"].split(":")[0], dtype=torch.bfloat16)


def scale(job: Job) -> float:
    """The activations come with a mean norm of sqrt(d); dictionary-learning's pipeline brings them to 1."""
    return 1 / math.sqrt(job["d_model"]) if job["library"] == "dictionary-learning" else 1.0


def count(codes: Tensor) -> Tensor:
    return (codes > 0).sum(dim=1)


def sparsify(job: Job, clock: Clock) -> Fitted:
    """The step of eai-sparsify's trainer around its `SparseCoder`, with Adam."""
    from sparsify import SparseCoder, SparseCoderConfig

    coder = SparseCoder(
        job["d_model"],
        SparseCoderConfig(num_latents=job["latents"], k=job["k"]),
        device=job["device"],
        dtype=torch.float32,
    )
    optimiser = torch.optim.Adam(coder.parameters(), lr=job["lr"], fused=True)
    idle = torch.zeros(job["latents"], dtype=torch.long, device=job["device"])
    context = autocast(job)
    for step, x in enumerate(clock):
        if step == 0:
            coder.b_dec.data = x.mean(dim=0)
        coder.set_decoder_norm_to_unit_norm()
        with context():
            out = coder(x)
        out.fvu.backward()
        coder.remove_gradient_parallel_to_decoder_directions()
        for group in optimiser.param_groups:
            group["lr"] = job["lr"] * contest.factor(step, job["schedule"])
        optimiser.step()
        optimiser.zero_grad()
        with torch.no_grad():
            idle += len(x)
            idle[out.latent_indices.flatten()] = 0
    coder.set_decoder_norm_to_unit_norm()

    def infer(x: Tensor) -> tuple[Tensor, Tensor]:
        found = coder(x)
        return found.sae_out, count(found.latent_acts)

    return Fitted(infer, None)


def dictionary_learning(job: Job, clock: Clock) -> Fitted:
    """`Trainer.update` on in-memory batches, under autocast where asked, as its `trainSAE` does."""
    from dictionary_learning.trainers.batch_top_k import BatchTopKTrainer
    from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKTrainer
    from dictionary_learning.trainers.top_k import TopKTrainer

    made = {"topk": TopKTrainer, "batch_topk": BatchTopKTrainer, "matryoshka": MatryoshkaBatchTopKTrainer}
    family, steps = job["family"], job["schedule"]
    more = {"group_fractions": list(contest.MATRYOSHKA_SHARES)} if family == "matryoshka" else {}
    trainer = made[family](
        steps=steps,
        activation_dim=job["d_model"],
        dict_size=job["latents"],
        k=job["k"],
        layer=0,
        lm_name="none",
        lr=job["lr"],
        warmup_steps=max(1, round(contest.WARM_UP * steps)),
        decay_start=int((1 - contest.DECAY) * steps),
        threshold_start_step=int(LATE * steps) if job["quality"] else 1000,
        device=job["device"],
        seed=job["seed"],
        **more,
    )
    if family == "matryoshka" and isinstance(trainer.ae.group_sizes, Tensor):
        trainer.ae.group_sizes = trainer.ae.group_sizes.cpu()
    context = autocast(job)
    for step, x in enumerate(clock):
        with context():
            trainer.update(step, x)
    ae = trainer.ae

    def infer(x: Tensor) -> tuple[Tensor, Tensor]:
        codes = ae.encode(x)
        return ae.decode(codes), count(codes)

    if family == "topk":
        return Fitted(infer, None)
    if family == "matryoshka":
        return Fitted(infer, Weights(ae.W_enc, ae.b_enc, ae.W_dec, ae.b_dec, ae.b_dec))
    weights = Weights(ae.encoder.weight.T, ae.encoder.bias, ae.decoder.weight.T, ae.b_dec, ae.b_dec)
    return Fitted(infer, weights)


def sae_lens(job: Job, clock: Clock) -> Fitted:
    """`SAETrainer.fit` on a data provider; what is measured is the inference model it saves."""
    from sae_lens import SAE
    from sae_lens.config import LoggingConfig, SAETrainerConfig
    from sae_lens.training.sae_trainer import SAETrainer

    steps = job["schedule"]
    config = SAETrainerConfig(
        total_training_samples=steps * clock.batch,
        train_batch_size_samples=clock.batch,
        lr=job["lr"],
        lr_end=job["lr"],
        lr_warm_up_steps=max(2, round(contest.WARM_UP * steps)),
        lr_decay_steps=round(contest.DECAY * steps),
        device=job["device"],
        autocast=job["dtype"] == "bfloat16",
        logger=LoggingConfig(log_to_wandb=False),
    )
    sae = _training_sae(job)
    # `fit` asks for the next batch after every step; the clock ends the run by having none.
    with contextlib.suppress(StopIteration):
        SAETrainer(cfg=config, sae=sae, data_provider=clock).fit()
    with tempfile.TemporaryDirectory() as folder:
        sae.save_inference_model(folder)
        made = SAE.load_from_disk(folder, device=job["device"])

    def infer(x: Tensor) -> tuple[Tensor, Tensor]:
        codes = made.encode(x)
        return made.decode(codes), count(codes)

    if job["family"] == "topk":
        return Fitted(infer, None)
    shift = made.b_dec if made.cfg.apply_b_dec_to_input else 0.0
    return Fitted(infer, Weights(made.W_enc, made.b_enc, made.W_dec, made.b_dec, shift))


def _training_sae(job: Job):
    import sae_lens as sl

    size = {"d_in": job["d_model"], "d_sae": job["latents"], "device": job["device"], "dtype": "float32"}
    size |= {"normalize_activations": "none", **job["options"]}
    family = job["family"]
    if job["quality"] and family in ("batch_topk", "matryoshka"):
        # The default of 0.01 starts at zero and would still be far from the threshold at the end of a short run.
        size["topk_threshold_lr"] = 0.1
    if family == "topk":
        return sl.TopKTrainingSAE(sl.TopKTrainingSAEConfig(k=job["k"], **size))
    if family == "batch_topk":
        return sl.BatchTopKTrainingSAE(sl.BatchTopKTrainingSAEConfig(k=job["k"], **size))
    if family == "matryoshka":
        widths = list(contest.prefixes(job["latents"]))
        config = sl.MatryoshkaBatchTopKTrainingSAEConfig(k=job["k"], matryoshka_widths=widths, **size)
        return sl.MatryoshkaBatchTopKTrainingSAE(config)
    if family == "jumprelu":
        return sl.JumpReLUTrainingSAE(sl.JumpReLUTrainingSAEConfig(**size))
    return sl.StandardTrainingSAE(sl.StandardTrainingSAEConfig(**size))


def recipe(job: Job, clock: Clock) -> Fitted:
    """The dense crosscoder of `recipe.py`."""
    model = DenseCrosscoder(job["models"], job["d_model"], job["latents"]).to(job["device"])
    start = int(LATE * job["schedule"]) if job["quality"] else 1000
    trainer = DenseTrainer(
        model, job["k"], lambda step: job["lr"] * contest.factor(step, job["schedule"]), start
    )
    context = autocast(job)
    for x in clock:
        trainer.advance(x, context)

    def infer(flat: Tensor) -> tuple[Tensor, Tensor]:
        codes = model.encode(flat)
        return model.decode(codes), count(codes)

    return Fitted(infer, Weights(model.W_enc, model.b_enc, model.W_dec, model.b_dec, 0.0))


BUILDERS = {
    "eai-sparsify": sparsify,
    "dictionary-learning": dictionary_learning,
    "sae-lens": sae_lens,
    "recipe": recipe,
}
