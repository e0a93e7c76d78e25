"""Steering: latents added, scaled, clamped or ablated while a model reads and writes."""
