"""What can go wrong for a user: each error says what was expected, what was found and what to do."""


class PalimpsestError(Exception):
    """Base of every error that is the input's fault, not a bug; the command line prints it and exits 2.

    Args:
        problem: One sentence that names the thing at fault.
        expected: What would have been accepted.
        found: What was there instead.
        fix: What the reader can do now.
    """

    def __init__(
        self,
        problem: str,
        *,
        expected: object | None = None,
        found: object | None = None,
        fix: str | None = None,
    ) -> None:
        self.problem, self.expected, self.found, self.fix = problem, expected, found, fix
        parts = [problem.rstrip(".") + "."]
        if expected is not None:
            parts.append(f"Expected: {expected}.")
        if found is not None:
            parts.append(f"Found: {str(found).rstrip('.')}.")
        if fix is not None:
            parts.append(fix.rstrip(".") + ".")
        super().__init__(" ".join(parts))


class ConfigError(PalimpsestError):
    """A flag, a config file or a combination of options that makes no sense."""


class CorpusError(PalimpsestError):
    """Text that cannot be read or that holds too little to measure anything."""


class PairError(PalimpsestError):
    """Two models that are not a base and its fine-tune, or that cannot be loaded."""


class SiteError(PalimpsestError):
    """An address that this model does not have."""


class DictionaryError(PalimpsestError):
    """A dictionary that cannot be read, or that belongs to another model or site."""


class ArtifactError(PalimpsestError):
    """A folder that is unfinished, edited, locked or of an unknown schema."""


class NumericsError(PalimpsestError):
    """NaN or infinity where a measurement needs a number."""
