"""The local app: runs, latents, own text, steering and training in a browser. Imports torch only with a model."""

from palimpsest.web.app import create_app
from palimpsest.web.config import ServeConfig
from palimpsest.web.server import serve

__all__ = ["ServeConfig", "create_app", "serve"]
