"""Palimpsest: what did a fine-tune change in a language model."""
