"""Several corpora under names, as in `--corpus math=math.jsonl code=code.jsonl`."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from palimpsest.corpus import Corpus
from palimpsest.errors import ConfigError
from palimpsest.log import log
from palimpsest.options import CorpusOptions, parse_assignment


def named_source(source: str) -> tuple[str, str]:
    """Name and place of a corpus; an existing file whose path holds a `=` is that file.

    Raises:
        ConfigError: The name or the file is empty.
    """
    return (Path(source).name.split(".")[0], source) if Path(source).exists() else parse_assignment(source)


def open_named(
    sources: Sequence[str], tokenizer: Any, options: CorpusOptions, context: int | None
) -> list[Corpus]:
    """Open corpora that are read together.

    Args:
        sources: Each a file, a folder or a data set, with an optional name in front: `math=math.jsonl`.
        tokenizer: Of the models.
        options: How rows are read.
        context: Tokens that the models can read at once; longer documents are cut there.

    Raises:
        ConfigError: Two corpora have the same name, or are the same file.
        CorpusError: A source does not exist.
    """
    named = [named_source(source) for source in sources]
    names = [name for name, _ in named]
    if len(set(names)) != len(names):
        raise ConfigError(
            "Corpora need different names",
            expected="NAME=FILE, as in math=math.jsonl",
            found=", ".join(names),
        )
    if len({str(Path(source).resolve()) for _, source in named}) != len(named):
        raise ConfigError(
            "The same text is given twice, under two names",
            expected="different corpora",
            found=", ".join(source for _, source in named),
        )
    if context is not None and options.max_length > context:
        log.warning("Documents are cut at the model's context of %d tokens.", context)
        options = replace(options, max_length=context)
    return [Corpus(source, tokenizer, name=name, options=options) for name, source in named]
