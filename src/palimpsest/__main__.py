"""`python -m palimpsest`."""

from palimpsest.cli import entry

entry()
