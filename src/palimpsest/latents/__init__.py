"""What is known of every latent, read back in milliseconds. No torch."""

from palimpsest.latents.example_file import Example
from palimpsest.latents.index import LatentIndex, Page, Query
from palimpsest.latents.labels import Label, read_labels

__all__ = ["Example", "Label", "LatentIndex", "Page", "Query", "read_labels"]
