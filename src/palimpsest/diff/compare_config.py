"""The options of a comparison of diffs."""

from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Annotated

from palimpsest.errors import ConfigError
from palimpsest.options import FLAT, RunOptions


@dataclass(frozen=True)
class CompareConfig:
    """Finished diffs of one pair at one site, each through another dictionary."""

    runs: tuple[str, ...]
    """Folders that `palimpsest diff` wrote."""

    _: KW_ONLY

    run: Annotated[RunOptions, FLAT]
    """Where the comparison goes."""

    def __post_init__(self) -> None:
        """Require two different folders."""
        folders = [Path(path).resolve() for path in self.runs]
        if len(folders) < 2:
            raise ConfigError("A comparison needs several diffs", expected="two or more", found=len(folders))
        twice = next((path for i, path in enumerate(self.runs) if folders[i] in folders[:i]), None)
        if twice is not None:
            raise ConfigError("A diff is compared with itself", found=f"{twice} given twice")
