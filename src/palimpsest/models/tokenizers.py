"""One tokenizer for a pair: the base's, once the tuned model's is shown to agree with it."""

from pathlib import Path
from typing import Any

from palimpsest.errors import PairError
from palimpsest.options import ModelOptions

PROBE = "User: 12 + 30 = 42.\n\nAssistant: def f(x):\n    return x  # naïve — 日本\t🙂"
"""Text that touches digits, punctuation, indentation and non-Latin script."""


def load_tokenizer(
    model: str | Path, revision: str | None, options: ModelOptions, *, required: bool = True
) -> Any:
    """The tokenizer of a model folder or hub id; None when it has none and none is required.

    Raises:
        PairError: When it is required and cannot be loaded.
    """
    from transformers import AutoTokenizer

    folder = Path(model)
    if not required and folder.is_dir() and not any(folder.glob("tokenizer*")):
        return None
    try:
        return AutoTokenizer.from_pretrained(
            str(model), revision=revision, trust_remote_code=options.trust_remote_code
        )
    except (OSError, ValueError, KeyError, ImportError) as error:
        if not required:
            return None
        raise PairError(
            f"Cannot load the tokenizer of {model}",
            expected="a folder with config.json and tokenizer files, or a hub id",
            found=" ".join(str(error).split())[:400],
            fix="Check the path; offline, only local folders and cached hub models can be read",
        ) from error


def shared_tokenizer(base: Any, tuned: Any | None, base_name: str, tuned_name: str) -> Any:
    """The tokenizer both models are read with: the base's, with the tuned one's chat template if it has none.

    Raises:
        PairError: When an id that both know stands for two tokens, or a probe text is split differently.
    """
    if tuned is None:
        return base
    mine = {index: token for token, index in base.get_vocab().items()}
    other = {index: token for token, index in tuned.get_vocab().items()}
    fix = "Audit a fine-tune that kept the base's tokenizer; added tokens are fine"
    for index in sorted(mine.keys() & other.keys()):
        if mine[index] != other[index]:
            raise PairError(
                f"The tokenizers of {base_name} and {tuned_name} disagree at id {index}",
                expected=repr(mine[index]),
                found=repr(other[index]),
                fix=fix,
            )
    split, split_other = (t(PROBE, add_special_tokens=False)["input_ids"] for t in (base, tuned))
    if split != split_other:
        at = next(
            (i for i, (a, b) in enumerate(zip(split, split_other, strict=False)) if a != b),
            min(len(split), len(split_other)),
        )
        raise PairError(
            f"The tokenizers of {base_name} and {tuned_name} split the same text differently at token {at}",
            expected=f"ids {split[at : at + 3]}",
            found=f"ids {split_other[at : at + 3]}",
            fix=fix,
        )
    if not base.chat_template and tuned.chat_template:
        base.chat_template = tuned.chat_template
    return base
