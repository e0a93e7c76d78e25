"""A tiny base, a fine-tune and an adapter of it, and text: what most comparisons with a reference start from."""

import pytest

from pair_fixture import adapt, fine_tune, lora
from text_fixture import write_words


@pytest.fixture(scope="module")
def base(tiny_llama):
    return tiny_llama()


@pytest.fixture(scope="module")
def tuned(base, tiny_tokenizer, tmp_path_factory):
    return fine_tune(base, tmp_path_factory.mktemp("tuned"), tiny_tokenizer)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_words(tmp_path_factory.mktemp("text") / "words.jsonl")


@pytest.fixture(scope="module")
def adapter(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("lora") / "adapter"
    adapt(base, folder, lora())
    return folder
