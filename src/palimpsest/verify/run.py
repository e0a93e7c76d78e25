"""A verification from names: what the command line calls."""

from palimpsest.corpus.rows import parse_source
from palimpsest.dictionaries import Dictionary, load_dictionary
from palimpsest.evaluate.run import load_source, open_corpus
from palimpsest.models import LanguageModel
from palimpsest.verify.check import verify_dictionary
from palimpsest.verify.config import VerifyConfig
from palimpsest.verify.result import Verification


def run_verify(config: VerifyConfig, dictionary: Dictionary | None = None) -> Verification:
    """Load a dictionary, its model or pair and text, and verify it; nothing is written.

    Args:
        config: What is loaded.
        dictionary: Used instead of loading `config.dictionary`, as after a conversion.

    Raises:
        PalimpsestError: Bad input.
    """
    for source in config.corpus:
        parse_source(source)
    loaded = dictionary if dictionary is not None else load_dictionary(config.dictionary)
    source = load_source(config)
    device = source.device if isinstance(source, LanguageModel) else source.base.device
    corpus = open_corpus(config, source)
    return verify_dictionary(
        loaded.to(device),
        source,
        corpus,
        site=config.site,
        tokens=config.tokens,
        search=config.search,
        seed=config.seed,
    )
