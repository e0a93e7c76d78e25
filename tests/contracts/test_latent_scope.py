"""Which tokens an adapter edits: by scope, in training, in plain passes and while generating."""

from __future__ import annotations

import pytest
import torch

from latent_world import adapted, dictionary, tokens
from palimpsest.errors import ConfigError
from palimpsest.tune.adapter import answering, latent_layers

IDS = tokens(2, 8)
LABELS = torch.where(torch.arange(8) >= 5, IDS, -100)


def edited(model, **arguments):
    """The tokens that were edited in one forward pass, as a watcher sees them."""
    seen, layer = [], latent_layers(model)[0]
    layer.watchers.append(seen.append)
    model(**arguments)
    layer.watchers.clear()
    if not seen:
        return torch.zeros(arguments["input_ids"].shape, dtype=torch.bool)
    mask = seen[-1].edited
    return torch.ones_like(IDS, dtype=torch.bool) if mask is None else mask.view(arguments["input_ids"].shape)


@pytest.mark.parametrize(
    ("scope", "count", "expected"),
    [
        ("all", 1, [0, 1, 1, 1, 1, 1, 1, 1]),
        ("prompt", 1, [0, 1, 1, 1, 1, 0, 0, 0]),
        ("answer", 1, [0, 0, 0, 0, 0, 1, 1, 1]),
        ("first", 3, [0, 1, 1, 1, 0, 0, 0, 0]),
        ("last", 2, [0, 0, 0, 1, 1, 0, 0, 0]),
    ],
)
def test_labels_say_what_the_answer_is(scope, count, expected):
    model = adapted("active-bias", move=0.3, scope=scope, scope_tokens=count)
    assert edited(model, input_ids=IDS, labels=LABELS).long().tolist() == [expected] * 2
    with answering(model, LABELS != -100):
        assert edited(model, input_ids=IDS).long().tolist() == [expected] * 2


def test_only_edited_tokens_change_and_nothing_before_them():
    model = adapted("active-bias", move=0.5, scope="answer")
    with model.disable_adapter():
        base = model(input_ids=IDS, labels=LABELS).logits
    tuned = model(input_ids=IDS, labels=LABELS).logits
    assert torch.equal(tuned[:, :5], base[:, :5])
    assert not torch.isclose(tuned[:, 5:], base[:, 5:]).all()


def test_the_bos_and_padding_are_left_alone_unless_asked():
    ids = torch.cat([IDS, torch.zeros(2, 2, dtype=torch.long)], dim=1)
    model = adapted("active-bias", move=0.3)
    assert edited(model, input_ids=ids).long().tolist() == [[0] + [1] * 7 + [0, 0]] * 2
    seen, every = [], adapted("active-bias", move=0.3, skip_ids=[])
    latent_layers(every)[0].watchers.append(seen.append)
    every(input_ids=ids)
    assert seen[0].edited is None
    special = adapted("active-bias", move=0.3, skip_ids=[int(IDS[0, 3])])
    assert not edited(special, input_ids=IDS)[0, 3]


@pytest.mark.parametrize("scope", ["prompt", "answer", "last"])
def test_a_pass_that_does_not_say_is_refused(scope):
    model = adapted("active-bias", move=0.3, scope=scope)
    with pytest.raises(ConfigError, match="answering"):
        model(input_ids=IDS, use_cache=False)


def test_embeddings_hide_the_bos():
    model = adapted("active-bias", move=0.3)
    embedded = model.get_input_embeddings()(IDS)
    with pytest.raises(ConfigError, match="was given embeddings"):
        model(inputs_embeds=embedded)
    every = adapted("active-bias", move=0.3, skip_ids=[])
    torch.testing.assert_close(every(inputs_embeds=embedded).logits, every(IDS).logits)


@pytest.mark.parametrize(("scope", "prompt", "answer"), [("prompt", True, False), ("answer", False, True)])
def test_generation_tells_the_prompt_from_the_answer(scope, prompt, answer):
    model = adapted("active-bias", move=0.3, scope=scope)
    seen, layer = [], latent_layers(model)[0]
    layer.watchers.append(lambda one: seen.append((one.edited.numel(), bool(one.edited.any()))))
    model.generate(input_ids=IDS, max_new_tokens=4, do_sample=False)
    assert [any_ for n, any_ in seen if n == 16] == [prompt]
    assert any(any_ for n, any_ in seen if n == 2) == answer


def test_last_counts_from_the_end_of_a_padded_prompt():
    left = torch.cat([torch.zeros(2, 3, dtype=torch.long), IDS], dim=1)
    mask = (left != 0).long()
    none = torch.zeros_like(mask, dtype=torch.bool)
    model = adapted("active-bias", move=0.3, scope="last", scope_tokens=2)
    with answering(model, none):
        found = edited(model, input_ids=left, attention_mask=mask)
    assert found.long().tolist() == [[0] * 9 + [1, 1]] * 2
    first = adapted("active-bias", move=0.3, scope="first", scope_tokens=2, skip_ids=[])
    assert (
        edited(first, input_ids=left, attention_mask=mask).long().tolist() == [[0] * 3 + [1, 1] + [0] * 6] * 2
    )
    # Without a mask the padding is known by its id, and the BOS is not counted either.
    first = adapted("active-bias", move=0.3, scope="first", scope_tokens=2)
    assert edited(first, input_ids=left).long().tolist() == [[0] * 4 + [1, 1] + [0] * 5] * 2


def test_arguments_by_position_are_read():
    ids = torch.cat([torch.full((2, 3), 9), IDS], dim=1)
    mask = torch.ones_like(ids)
    mask[:, :3] = 0
    model = adapted("active-bias", move=0.3, scope="first", scope_tokens=1, skip_ids=[])
    seen = []
    latent_layers(model)[0].watchers.append(seen.append)
    model.get_base_model()(ids, mask)
    assert seen[0].edited.view_as(ids).long().tolist() == [[0] * 3 + [1] + [0] * 7] * 2


def test_a_cache_that_is_continued_by_several_tokens_does_not_say():
    model = adapted("active-bias", move=0.3, scope="answer")
    cache = model(input_ids=IDS[:, :4], use_cache=True, labels=IDS[:, :4]).past_key_values
    with pytest.raises(ConfigError, match="4 in the cache"):
        model(input_ids=IDS[:, 4:], past_key_values=cache)
    with pytest.raises(ConfigError, match="answering"):
        model.generate(input_ids=IDS, max_new_tokens=2, do_sample=False, use_cache=False)


def test_an_interrupted_pass_leaves_nothing_behind():
    model = adapted("active-bias", move=0.3, scope="answer")
    layer = latent_layers(model)[0]

    def interrupt(seen):
        raise KeyboardInterrupt

    layer.watchers.append(interrupt)
    with pytest.raises(KeyboardInterrupt):
        model(input_ids=IDS, labels=IDS)
    layer.watchers.clear()
    assert edited(model, input_ids=IDS, labels=LABELS).long().tolist() == [[0] * 5 + [1] * 3] * 2


def test_two_sites_agree_under_recomputation():
    """A layer with an adapter inside is not computed again in the backward pass, where another pass's tokens hold."""
    hooks = (dictionary(), "resid_post.1"), (dictionary(seed=1), "mlp_out.1")
    model = adapted("active-bias", *hooks, move=0.3, scope="answer").train()
    model.get_base_model().activation_checkpointing_enable()
    loss = model(input_ids=IDS, labels=LABELS).loss
    with torch.no_grad():
        model(input_ids=tokens(3, 8, seed=4), labels=tokens(3, 8, seed=4))
    loss.backward()
    plain = adapted("active-bias", *hooks, move=0.3, scope="answer").train()
    plain(input_ids=IDS, labels=LABELS).loss.backward()
    for one, other in zip(model.parameters(), plain.parameters(), strict=True):
        if one.requires_grad:
            torch.testing.assert_close(one.grad, other.grad)
