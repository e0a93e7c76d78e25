"""The tiny models that other tests stand on are what they claim to be."""

import torch

from helpers import assert_not_close


def test_tokenizer_round_trip_and_chat_template(tiny_tokenizer, tiny_llama):
    from transformers import AutoTokenizer

    loaded = AutoTokenizer.from_pretrained(tiny_llama())
    text = "Zwölf Äpfel,\n\tdef f(x): return x  # 漢字 🦉"
    assert loaded.decode(loaded(text, add_special_tokens=False)["input_ids"]) == text
    assert len(loaded) == len(tiny_tokenizer) == 320
    assert {loaded.bos_token, loaded.eos_token, loaded.pad_token} == {"<s>", "</s>", "<pad>"}
    chat = loaded.apply_chat_template([{"role": "user", "content": "hello"}], tokenize=False)
    assert chat == "<s><|user|>\nhello</s>\n"


def test_models_are_random_cached_and_overridable(tiny_llama):
    from transformers import AutoModelForCausalLM

    assert tiny_llama() == tiny_llama(seed=0)
    first, second = (AutoModelForCausalLM.from_pretrained(tiny_llama(seed=seed)) for seed in (0, 1))
    weights = dict(second.named_parameters())
    for name, parameter in first.named_parameters():
        assert_not_close(parameter, weights[name])
        assert parameter.std() > 0, f"{name} is symmetric"
    ids = torch.tensor([[1, 40, 41, 42]])
    assert first(ids).logits.shape == (1, 4, 320)
    wide = AutoModelForCausalLM.from_pretrained(tiny_llama(hidden_size=64, num_hidden_layers=3))
    assert (wide.config.hidden_size, wide.config.num_hidden_layers) == (64, 3)


def test_one_thread():
    assert torch.get_num_threads() == 1
