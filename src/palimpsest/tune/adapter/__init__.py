"""Latent adapters as an ordinary PEFT method: importing this registers it with peft.

Source: the registration is peft's own (https://github.com/huggingface/peft), which has no way to add a method's name.
"""

from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils import register_peft_method

from palimpsest.tune.adapter.components import Component
from palimpsest.tune.adapter.config import LATENT, LatentConfig
from palimpsest.tune.adapter.layer import LatentLayer, Seen, latent_layers, steering_vector
from palimpsest.tune.adapter.scope import answering
from palimpsest.tune.adapter.tuner import LatentTuner

if LATENT not in PEFT_TYPE_TO_CONFIG_MAPPING:
    register_peft_method(name="latent", config_cls=LatentConfig, model_cls=LatentTuner)

__all__ = [
    "Component",
    "LatentConfig",
    "LatentLayer",
    "LatentTuner",
    "Seen",
    "answering",
    "latent_layers",
    "steering_vector",
]
