"""From options to the one who labels and the one who judges."""

from __future__ import annotations

from typing import Any

from palimpsest.interpret.labels.config import LabelConfig, ProviderOptions
from palimpsest.interpret.labels.endpoint import Endpoint, EndpointJudge, EndpointLabeller, key_of
from palimpsest.interpret.labels.lookup import NeuronpediaLabeller, source_of
from palimpsest.interpret.labels.protocol import Judge, Labeller
from palimpsest.interpret.labels.tokens import TokenJudge, TokenLabeller


def make_labeller(config: LabelConfig, about: dict[str, Any]) -> Labeller:
    """Who labels.

    Args:
        config: The options.
        about: What the examples folder says of itself.

    Raises:
        PalimpsestError: There is no key, no such model, no id at Neuronpedia.
    """
    options = config.providers
    if config.provider == "neuronpedia":
        return NeuronpediaLabeller(source_of(about, options.neuronpedia))
    if config.provider == "openai":
        return EndpointLabeller(_server(options, options.endpoint, options.model))
    return _local(str(options.model), options) if config.provider == "local" else TokenLabeller()


def make_judge(config: LabelConfig, labeller: Labeller) -> Judge | None:
    """Who judges, or None for nobody; a local model that labels and judges is loaded once.

    Raises:
        PalimpsestError: There is no key, no such model.
    """
    model, address = config.judge_at
    if config.judge == "openai":
        return EndpointJudge(_server(config.providers, address, model))
    if config.judge == "local":
        if config.provider == "local" and model == config.providers.model and isinstance(labeller, Judge):
            return labeller
        return _local(str(model), config.providers)
    return TokenJudge() if config.judge == "tokens" else None


def _local(name: str, options: ProviderOptions) -> Any:
    from palimpsest.interpret.labels.local import LocalModel
    from palimpsest.models import load_model
    from palimpsest.options import ModelOptions

    return LocalModel(load_model(name, ModelOptions(dtype=options.dtype, device=options.device)))


def _server(options: ProviderOptions, address: str | None, model: str | None) -> Endpoint:
    assert address is not None and model is not None
    return Endpoint(
        address,
        model,
        key_of(options.key_variable, address),
        timeout=options.timeout,
        retries=options.retries,
        allow_http=options.allow_http,
    )
