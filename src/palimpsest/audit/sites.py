"""Which site a dictionary is read at, checked against the model."""

from palimpsest.dictionaries import Dictionary
from palimpsest.errors import DictionaryError
from palimpsest.models import LanguageModel


def site_of(
    dictionary: Dictionary, path: str, model: LanguageModel, asked: str | None = None, *, force: bool = False
) -> str:
    """The site to read: the dictionary's own, or the one that was asked for.

    Raises:
        DictionaryError: It reads two models or their difference, names no site, was trained at another one, or has
            another width.
        SiteError: The model has no such site.
    """
    sites = model.sites
    if dictionary.models != 1:
        raise DictionaryError(
            f"{path} reads two models at once",
            expected="a dictionary of one model (an SAE): both models are read through it",
            found=f"a dictionary of {dictionary.models} models",
        )
    if dictionary.view == "diff":
        raise DictionaryError(
            f"{path} reads the difference of two models",
            expected="a dictionary of one model's activations (view base or tuned): both models are read through it",
            found="view diff",
        )
    own = sites.canonical(dictionary.site) if dictionary.site else None
    wanted = sites.canonical(asked) if asked else None
    if wanted:
        sites.tap(wanted)
    if own is None and wanted is None:
        raise DictionaryError(
            f"{path} does not say which site it reads",
            fix="Name it with --site, as in resid_post.13",
        )
    if own and wanted and own != wanted and not force:
        raise DictionaryError(
            f"{path} was trained on another site",
            expected=own,
            found=wanted,
            fix="Leave --site out, or pass --force-site to read it there all the same",
        )
    site = wanted or own
    assert site is not None
    sites.tap(site)
    width = model.width(site)
    if dictionary.d_model != width:
        raise DictionaryError(
            f"{path} does not fit {model.name}",
            expected=f"a dictionary of width {width}, as {site} has",
            found=f"width {dictionary.d_model}",
            fix="Use a dictionary that was trained on this base model",
        )
    return site
