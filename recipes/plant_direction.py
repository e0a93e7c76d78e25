"""A fine-tune with known truth: the base with one more direction, which an MLP writes on tokens that hold a digit.

    python recipes/plant_direction.py BASE CORPUS... --out FOLDER [--layer 1] [--size 1.0] [--seed 20260]

The direction is random and orthogonal to the mean activation; a rank-one change of one MLP's output matrix writes it,
read out of that MLP's own hidden activations by ridge regression of "this token holds a digit". Nothing else changes,
so a diff of the two must find one tuned-only latent, and it must carry the difference.
"""

import argparse
import json
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

DOCUMENTS, LENGTH = 400, 192


def hidden_activations(model, tokenizer, layer, texts):
    """What the MLP's output matrix reads, what it writes, and which tokens hold a digit."""
    seen, ids = [], []
    module = model.model.layers[layer].mlp.down_proj
    hook = module.register_forward_pre_hook(lambda _, args: seen.append(args[0][0, 1:]))
    for text in texts:
        tokens = [tokenizer.bos_token_id, *tokenizer(text, add_special_tokens=False).input_ids][:LENGTH]
        if len(tokens) < 2:
            continue
        model(input_ids=torch.tensor([tokens]))
        ids += tokens[1:]
    hook.remove()
    digit = torch.tensor([any(c.isdigit() for c in tokenizer.decode([i])) for i in ids])
    return torch.cat(seen), digit


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("base")
    parser.add_argument("corpus", nargs="+")
    parser.add_argument("--out", required=True)
    parser.add_argument("--layer", type=int, default=1)
    parser.add_argument(
        "--size", type=float, default=1.0, help="length of the direction, in lengths of the activations"
    )
    # No seed of a dictionary: the same one would draw the direction as the start of its first latent.
    parser.add_argument("--seed", type=int, default=20260)
    options = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(options.base)
    model = AutoModelForCausalLM.from_pretrained(options.base, dtype=torch.float32).eval()
    texts = []
    for path in options.corpus:
        rows = [json.loads(line)["text"] for line in Path(path).read_text().split("\n") if line]
        texts += rows[: DOCUMENTS // len(options.corpus)]
    with torch.no_grad():
        hidden, digit = hidden_activations(model, tokenizer, options.layer, texts)
        ids = torch.tensor([tokenizer(texts[0]).input_ids[:LENGTH]])
        length = (
            model(input_ids=ids, output_hidden_states=True)
            .hidden_states[options.layer + 1][0, 1:]
            .norm(dim=1)
            .mean()
        )
        generator = torch.Generator().manual_seed(options.seed)
        direction = torch.nn.functional.normalize(
            torch.randn(model.config.hidden_size, generator=generator), dim=0
        )
        target = digit.float()
        gram = hidden.T @ hidden + 1e-3 * hidden.square().sum() / hidden.shape[1] * torch.eye(hidden.shape[1])
        reader = torch.linalg.solve(gram, hidden.T @ target)
        model.model.layers[options.layer].mlp.down_proj.weight += (
            options.size * length * direction[:, None] * reader[None]
        )
        written = hidden @ reader
    model.save_pretrained(options.out)
    tokenizer.save_pretrained(options.out)
    print(
        f"{options.out}: {digit.float().mean():.1%} of the tokens hold a digit; the direction is written there with "
        f"{written[digit].mean():.2f} of its length, elsewhere with {written[~digit].abs().mean():.2f}"
    )


if __name__ == "__main__":
    main()
