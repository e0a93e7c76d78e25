"""Labels without any model: the tokens on which a latent fires beyond their frequency, and the rule that they make."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence

from palimpsest.interpret.labels.protocol import Evidence, Text
from palimpsest.labelcache import LENGTH

BEGIN = "fires on: "
MOST = 8
"""Tokens in a label."""
SHARE = 1 / 3
"""A token stands out when its z is at least this share of the strongest one's."""
LONGEST = 40
_QUOTED = re.compile(r'"(?:[^"\\]|\\.)*"')


class TokenLabeller:
    """Names tokens: `fires on: "2", " three"`: those that stand out by their log-odds, then those of its examples."""

    def label(self, evidence: Evidence) -> str | None:
        """The label; None where no example shows a token."""
        strongest = max(evidence.tokens_z, default=0.0)
        pairs = zip(evidence.tokens, evidence.tokens_z, strict=True)
        tokens = [token for token, z in pairs if z > 0 and z >= SHARE * strongest]
        seen = Counter(one.tokens[one.peak] for one in evidence.examples)
        common = sorted(seen, key=lambda token: (-seen[token], token))
        return token_label([*tokens, *(token for token in common if token not in tokens)])


class TokenJudge:
    """A label fits where the token in question is one that it quotes, spaces around it aside."""

    def judge(self, label: str, texts: Sequence[Text]) -> list[bool | None]:
        """The verdicts; None for all texts where the label quotes nothing, as a sentence does."""
        quoted = quoted_tokens(label)
        if not quoted:
            return [None] * len(texts)
        bare = {token.strip() for token in quoted} - {""}
        return [text.tokens[text.peak] in quoted or text.tokens[text.peak].strip() in bare for text in texts]


def token_label(tokens: Sequence[str]) -> str | None:
    """Tokens as a label of one printable line, as many as fit."""
    label = ""
    for token in [one for one in tokens if 0 < len(one) <= LONGEST][:MOST]:
        longer = f"{label}, {_quote(token)}" if label else BEGIN + _quote(token)
        if len(longer) > LENGTH:
            break
        label = longer
    return label or None


def quoted_tokens(label: str) -> set[str]:
    """The tokens that a label quotes."""
    found = set()
    for quoted in _QUOTED.findall(label):
        try:
            found.add(json.loads(quoted))
        except ValueError:
            continue
    return found - {""}


def _quote(token: str) -> str:
    """A JSON string that survives tidying: nothing unprintable, no two spaces in a row."""
    quoted = json.dumps(token, ensure_ascii=False)
    shown = "".join(c if c.isprintable() else json.dumps(c)[1:-1] for c in quoted)
    return re.sub(r"  +", lambda run: "\\u0020" * len(run[0]), shown)
