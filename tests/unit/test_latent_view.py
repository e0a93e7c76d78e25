"""A latent's card: what it says is what the examples folder holds, in few bytes, and nothing on it runs."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from latents_fixture import HOSTILE, make_examples, make_labels
from palimpsest.errors import ConfigError
from palimpsest.latents import Example, LatentIndex
from palimpsest.report.display import visible
from palimpsest.report.environment import environment
from palimpsest.report.latent_shapes import histogram
from palimpsest.report.latent_view import LatentView, latent_view
from palimpsest.report.latent_windows import LEVELS, groups_of

EVIDENCE = [("diff", {"class": "tuned-only", "verdict": "tuned-specific", "share": 0.25, "none": None})]
TEXT = {"h3", "h4", "span", "bdi", "p", "small", "i", "b", "mark", "a", "ol", "li", "dl", "dt", "dd"}
PARTS = {"article", "header", "div", "figure", "figcaption", "details", "summary", "svg", "line", "path"}
TAGS = TEXT | PARTS | {"table", "thead", "tbody", "tr", "th", "td"}
BIDI = re.compile("[\u202a-\u202e\u2066-\u2069\u200b\x00-\x08\x1b]")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("cards")
    make_examples(root / "sae")
    make_examples(root / "pair", kind="crosscoder")
    make_examples(root / "diff", kind="diff")
    make_examples(root / "hostile", hostile=True)
    make_labels(root / "labels", [1, 2, 3])
    make_labels(root / "unscored", [4], scored=False)
    make_labels(root / "evil", [1, 2], hostile=True)
    return root


@pytest.fixture(scope="module")
def index(folder: Path) -> LatentIndex:
    return LatentIndex.open(folder / "sae", [folder / "labels", folder / "unscored"])


def card(view: LatentView, **options: Any) -> str:
    module = environment().get_template("latent.html.j2").module
    return str(module.card(view, **options))  # type: ignore[attr-defined]


class Seen(HTMLParser):
    """Elements, attributes and text of some HTML."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data: str) -> None:
        self.text += data


def test_every_window_says_its_tokens_and_marks_where_the_latent_fires(index):
    view, found = latent_view(index, 2), index.examples(2)
    shown = [one for group in view.groups for one in group.examples]
    assert len(shown) == len(found)
    for one, example in zip(shown, found, strict=True):
        assert "".join(piece.text for piece in one.pieces).replace("␣", " ") == "".join(
            map(visible, example.tokens)
        )
        marked = [piece.text for piece in one.pieces if piece.style]
        assert marked == [example.tokens[place].strip() or "␣" for place in (20, 24, 25)]
        assert [piece.text for piece in one.pieces if piece.peak] == [example.tokens[24].strip()]
        assert (one.base, one.tuned) == (f"{example.base:.2f}", f"{example.tuned:.2f}")
        assert one.corpus == example.corpus and one.document == str(example.document)


def test_both_models_are_drawn_and_a_silent_base_has_no_underline(index):
    loud = [
        piece
        for group in latent_view(index, 2).groups
        for one in group.examples
        for piece in one.pieces
        if piece.style
    ]
    assert all(re.fullmatch(r"b\d t\d", piece.style) for piece in loud)
    new = [
        piece
        for group in latent_view(index, 1).groups
        for one in group.examples
        for piece in one.pieces
        if piece.style
    ]
    assert new and all(re.fullmatch(r"t\d", piece.style) for piece in new)
    assert "0%" in [one.rate for one in latent_view(index, 1).strengths if one.side == "base"]


def test_levels_follow_the_activation_on_one_scale_for_all_examples():
    def example(value: float, base: float) -> Example:
        spread = {"value_at": [0.0, value], "base_at": [0.0, base], "tuned_at": [0.0, value]}
        return Example(0, 0, "c", 1, 0, 1, value, base, value, ["a", " b"], [0, 1], **spread)  # type: ignore[arg-type]

    found = [example(8.0, 4.0), example(0.01, 0.0), example(4.0, 8.0)]
    pieces = [one.pieces[-1] for one in groups_of(found, ("base", "tuned"), None, True)[0].examples]
    assert [piece.style for piece in pieces] == [f"b4 t{LEVELS}", "t1", f"b{LEVELS} t4"]
    assert pieces[0].title == "base 4.00, tuned 8.00" and pieces[0].peak


def test_groups_are_the_strongest_and_each_bin(index):
    view = latent_view(index, 2)
    assert [group.title for group in view.groups] == ["Strongest", *(f"Bin {i} of 5" for i in range(1, 6))]
    assert view.groups[1].note == "the weakest" and len(view.groups[0].examples) == 5


def test_a_short_card_keeps_its_limits_and_its_peak(index):
    short, full = (latent_view(index, 2, limits=(2, 1), detail=one) for one in (False, True))
    assert [len(group.examples) for group in short.groups] == [2, 5] and short.groups[
        1
    ].title == "Weaker ones"
    pieces = short.groups[0].examples[0].pieces
    assert (
        pieces[0].text.startswith("…") and pieces[-1].text.endswith("…") and any(one.peak for one in pieces)
    )
    assert not any(piece.title for piece in pieces) and len(short.tokens.words) == 5
    assert not any(word.number for word in short.tokens.words) and all(
        word.number for word in full.tokens.words
    )
    changed = next(one for one in short.lens if one.title == "changed most")
    assert all(word.number[0] in "+−0" for word in changed.words)
    assert [len(group.examples) for group in latent_view(index, 2, limits=(1, 0)).groups] == [1]


def test_two_thousand_short_cards_fit_into_seven_megabytes(index):
    latents = index.latents[:60].tolist()
    sizes = [
        len(card(latent_view(index, one, EVIDENCE, limits=(2, 0), detail=False), explained=False).encode())
        for one in latents
    ]
    assert 2000 * sum(sizes) / len(sizes) < 7_600_000


def test_the_card_says_what_the_folder_says(index):
    view, row = latent_view(index, 3, EVIDENCE), index.row(3)
    assert view.label == "numbers in sums 3" and view.provider == "tokens" and view.score.text == "0.90"
    assert (
        view.score.whisker is not None and "40 texts" in view.judged and "0.60 against similar" in view.judged
    )
    assert [one.text.replace("␣", " ") for one in view.tokens.words] == [
        visible(one) for one in row["tokens"]
    ]
    both = [(title, side) for title in ("promotes", "suppresses") for side in ("base", "tuned")]
    assert [(one.title, one.side) for one in view.lens] == [*both, ("changed most", "")]
    assert [one for one, _, _ in view.neighbours] == [one for one in row["neighbours"] if one != 3][:8]
    assert [bar.name for bar in view.corpora] == ["general", "math"] and max(
        bar.width for bar in view.corpora
    ) == 20
    assert view.roles == [] and view.chips == [("tuned-only", "diff"), ("tuned-specific", "diff")]
    assert ("share", "0.25") in view.evidence[0][1] and "none" not in dict(view.evidence[0][1])
    html = card(view)
    for part in (
        "Latent 3",
        "numbers in sums 3",
        "balanced accuracy",
        "tuned-only",
        "general",
        view.note.replace("'", "&#39;"),
    ):
        assert part in html
    assert html.count("<mark") == len(index.examples(3)) + 1


def test_labels_without_score_and_no_labels_say_so(index):
    assert "not scored" in card(latent_view(index, 4)) and "Label by" not in card(latent_view(index, 5))


@pytest.mark.parametrize("link", ["#latent-{}", "/runs/a/latents/{}?x=1&y=2", "/runs/{0.__class__}{x}/{}"])
def test_neighbours_are_links_of_the_page_that_draws_them(index, link):
    view = latent_view(index, 2, link=link)
    hrefs = [value for name, value in Seen(card(view)).attributes if name == "href"]
    assert hrefs == [link.replace("{}", str(one)) for one, _, _ in view.neighbours]


def test_a_difference_has_one_signal_and_a_crosscoder_three(folder):
    one = latent_view(LatentIndex.open(folder / "diff"), 2)
    assert one.sides == () and [row.name for row in one.strengths] == ["all"]
    styles = {piece.style[0] for piece in one.groups[0].examples[0].pieces if piece.style}
    assert styles == {"v"} and one.groups[0].examples[0].base == ""
    assert one.histogram is not None and [side for side, _ in one.histogram.shapes] == ["value"]
    pair = latent_view(LatentIndex.open(folder / "pair"), 2)
    assert [row.name for row in pair.strengths] == ["joint", *pair.sides] == ["joint", "base", "tuned"]
    first = pair.groups[0].examples[0]
    assert first.joint == first.value and f"<i>joint</i> {first.joint}" in card(pair)
    assert pair.histogram is not None and [side for side, _ in pair.histogram.shapes] == ["base", "tuned"]
    assert "as background" in card(one) and "as underline" not in card(one)


def test_a_latent_that_never_fired_is_refused(index):
    for latent in (9, 5000, -1):
        with pytest.raises(ConfigError):
            latent_view(index, latent)


def test_histograms_are_on_one_scale_of_counts():
    row = {
        "histogram_start": -4,
        "histogram_base": [0, 10],
        "histogram_tuned": [40, 1],
        "histogram_value": [1],
    }
    drawn = histogram(row, ("base", "tuned"))
    assert drawn is not None and dict(drawn.shapes) == {
        "base": "M0 40V40h1V30h1V40",
        "tuned": "M0 40V2h1V39h1V40",
    }
    assert (drawn.bins, drawn.low, drawn.high) == (2, "0.25", "0.5")
    for empty in (
        {},
        {"histogram_start": None, "histogram_base": [1]},
        {"histogram_start": 0, "histogram_base": [0, 0]},
    ):
        assert histogram(empty, ("base",)) is None


def bare(**row: Any) -> Any:
    """An index of one latent of which nothing is known but what is given."""
    return SimpleNamespace(
        about={"corpora": {}},
        row=lambda latent: {"latent": 7, **row},
        examples=lambda *_: [],
        label=lambda _: None,
    )


@pytest.mark.parametrize("value", [None, float("nan"), float("inf")])
def test_what_is_not_known_is_a_dash_and_never_a_number(value):
    names = (
        "rate",
        "mean_value",
        "max_value",
        "rate_base",
        "mean_base",
        "rate_tuned",
        "label_score",
        "histogram_start",
    )
    view = latent_view(
        bare(**dict.fromkeys(names, value), neighbours=None, tokens=[None], tokens_z=[value]), 7
    )
    assert view.sides == () and view.strengths[0].rate == "–" and view.histogram is None
    html = card(view)
    assert "nan" not in html.lower() and "inf" not in html and "No examples of this latent were kept." in html


def test_a_model_alone_is_drawn_in_one_signal():
    spread = {"value_at": [1.0], "base_at": [1.0], "tuned_at": None}
    found = [Example(0, 0, "c", 1, 0, 0, 1.0, 1.0, None, ["a"], [0], **spread)]  # type: ignore[arg-type]
    alone = bare(rate=0.1, rate_base=0.1)
    alone.examples = lambda *_: found
    view = latent_view(alone, 7)
    assert view.sides == ("base",) and [row.name for row in view.strengths] == ["base"]
    piece = view.groups[0].examples[0].pieces[0]
    assert piece.style == f"v{LEVELS}" and piece.title == "base 1.00"


@pytest.mark.parametrize("detail", [True, False])
def test_hostile_tokens_labels_and_evidence_are_inert(folder, detail):
    index = LatentIndex.open(folder / "hostile", [folder / "evil"])
    evidence = [(HOSTILE[1], {HOSTILE[0]: HOSTILE[2], "class": HOSTILE[0], "verdict": HOSTILE[6]})]
    for latent in index.latents[:25].tolist():
        html = card(latent_view(index, latent, evidence, detail=detail))
        seen = Seen(html)
        assert set(seen.tags) <= TAGS and not any(name.startswith("on") for name, _ in seen.attributes)
        assert not BIDI.search(html) and not any(
            (value or "").startswith("javascript") for _, value in seen.attributes
        )
    assert "<script>window.__pwned=1</script> 1" in Seen(card(latent_view(index, 1, evidence))).text
    assert "⟨U+202E⟩" in Seen(html).text
    said = "".join(Seen(card(latent_view(index, one))).text for one in index.latents[:60].tolist())
    assert "{{ 7*7 }}" in said and "⟨U+001B⟩[31mred" in said and "\\xff" in said
