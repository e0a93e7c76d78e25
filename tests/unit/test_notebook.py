"""What results show in a notebook: everything has a card, nothing of it runs, intervals are drawn, none is large."""

import dataclasses
import inspect
import re
import types
import typing
from html.parser import HTMLParser
from importlib import import_module
from pathlib import Path

import pytest
import torch

import palimpsest
from palimpsest.artifacts import RunFolder, open_artifact
from palimpsest.artifacts.contents import NOTABLE, contents
from palimpsest.audit.battery.folder import Battery, ReaderEntry
from palimpsest.corpus import Corpus
from palimpsest.dictionaries import Dictionary
from palimpsest.dictionaries.codes import Codes
from palimpsest.diff.compare import Comparison
from palimpsest.diff.result import Diff
from palimpsest.display.notebook import LIMIT, Card, Measured, Rich, Table, card_html
from palimpsest.display.text import visible
from palimpsest.evaluate.result import Evaluation
from palimpsest.findings import AuditFinding, CalibrationFinding
from palimpsest.interpret.labels.result import Labelling
from palimpsest.models import load_model, load_pair
from palimpsest.store import ActivationStore
from palimpsest.tune.board import Board
from palimpsest.tune.explain.result import RANKINGS, AdapterComparison, Explanation
from palimpsest.verify.result import Verification

HOSTILE = (
    "</style></td><script>alert(1)</script><img src=x onerror=alert(2)>\u202egnp\x1b[31m\x00\u200b'\"{{7*7}}"
)
FIXED = {
    "alpha": 0.05,
    "confidence": 0.95,
    "seed": 0,
    "schema": 1,
    "method": "crosscoder",
    "k": 5,
    "pair": {"base": HOSTILE, "tuned": HOSTILE},
    "score": {"n": 3},
    "counts": {HOSTILE: 3},
    "dictionary": {"path": HOSTILE, "n_latents": 64, "activation": HOSTILE, "k": 8},
    "tuned_only": {"raw": 3, "surviving": 2, "undetermined": 1, "null": 0.5},
    "intersection_mean": {"5": 0.5},
    "ci": None,
    "objective": None,
    "ranked": [
        {
            "latent": 3380,
            "class": HOSTILE,
            "verdict": HOSTILE,
            "delta_norm": 0.5,
            "nu_error": 0.5,
            "nu_error_ci": [0.25, 0.75],
            "causal_share": 0.1,
            "rate_base": 0.5,
            "rate_tuned": 0.5,
            "examples": [{"before": HOSTILE, "token": HOSTILE, "after": HOSTILE}],
        }
    ],
    "contexts": [{"before": HOSTILE, "token": HOSTILE, "after": HOSTILE}],
}
SPLICE = {
    "ce": {"original": 3.0, "spliced": 3.5, "zero": 9.0, "mean": 8.0},
    "kl": {"spliced": 0.5, "zero": 9.0, "mean": 8.0},
    **{f"{name}_recovered": {"zero": 0.5, "mean": 0.5} for name in ("ce", "kl")},
    **{f"{name}_recovered_ci": {"zero": (0.25, 0.75), "mean": (0.25, 0.75)} for name in ("ce", "kl")},
}
OBJECTIVE = {"before": 3.0, "after": 2.5, "difference": -0.5, "ci": [-0.75, -0.25], "unit": HOSTILE}

FINDINGS = [
    AuditFinding,
    CalibrationFinding,
    Diff,
    Comparison,
    Evaluation,
    Verification,
    Board,
    Explanation,
    AdapterComparison,
    Labelling,
]


def made(kind: typing.Any, name: str = "", long: int = 2) -> typing.Any:
    """Return a value of an annotated type in which every text is hostile and every list has `long` entries."""
    if name == "ci" and "dict" in str(kind):
        return {"5": (0.25, 0.75)}
    if name in SPLICE and "dict" in str(kind):
        return SPLICE[name]
    if name == "objective" and "dict" in str(kind):
        return OBJECTIVE
    fixed = FIXED.get(name)
    if fixed is not None and type(fixed).__name__ in str(kind) and not dataclasses.is_dataclass(kind):
        return fixed * long if isinstance(fixed, list) else fixed
    origin, inside = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return made(next(one for one in inside if one is not type(None)), name, long)
    if dataclasses.is_dataclass(kind):
        hints = typing.get_type_hints(kind)
        return kind(**{one.name: made(hints[one.name], one.name, long) for one in dataclasses.fields(kind)})
    if origin is typing.Literal:
        return inside[0]
    if origin is tuple:
        return tuple(
            0.25 + 0.5 * place if one is float else made(one, "", long) for place, one in enumerate(inside)
        )
    if origin is list:
        return [made(inside[0], name, long) for _ in range(long)]
    if origin is dict:
        return {f"{HOSTILE}{place}": made(inside[1], "", long) for place in range(long)}
    return {str: HOSTILE, int: 3, float: 0.5, bool: True}.get(kind, HOSTILE)


class Reader(HTMLParser):
    """Collects what a browser would make elements and text of."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        self.text += " "
        if tag not in ("path", "circle", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in ("path", "circle"):
            assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.text += data


ALLOWED = {
    "b",
    "circle",
    "dd",
    "details",
    "div",
    "dl",
    "dt",
    "h4",
    "li",
    "p",
    "path",
    "small",
    "span",
    "style",
    "summary",
    "svg",
    "table",
    "tbody",
    "td",
    "th",
    "thead",
    "tr",
    "ul",
}


def check(html: str) -> Reader:
    """Fail unless the HTML is whole, of known elements, small, and free of what could act or hide."""
    assert len(html) < 100_000
    read = Reader(html)
    assert read.open == [], "an element is left open"
    assert {tag for tag, _ in read.elements} <= ALLOWED
    for tag, attributes in read.elements:
        assert not [
            name for name in attributes if name.startswith("on") or name in ("src", "href", "style")
        ], tag
        assert all(re.fullmatch(r"[\w .#-]*", value or "") for value in attributes.values())
    style = html[html.index("<style>") : html.index("</style>")]
    assert "url(" not in style and "@import" not in style
    assert all(visible(char) == char for char in read.text if char != "\n")
    return read


@pytest.mark.parametrize("kind", FINDINGS, ids=lambda kind: kind.__name__)
def test_hostile_text_is_inert_in_every_finding(kind):
    read = check(made(kind)._repr_html_())
    assert "<script>alert(1)" in read.text and "⟨U+202E⟩" in read.text
    assert "{{7*7}}" in read.text


@pytest.mark.parametrize("kind", FINDINGS, ids=lambda kind: kind.__name__)
def test_intervals_are_drawn_and_written(kind):
    finding = made(kind)
    if kind is Explanation:
        rankings = [dataclasses.replace(finding.rankings[0], by=by) for by in RANKINGS]
        curves = [dataclasses.replace(finding.curves[0], kind="keep")]
        finding = dataclasses.replace(finding, rankings=rankings, curves=curves)
    read = check(finding._repr_html_())
    if kind is Labelling:
        row = dataclasses.replace(finding.rows[0], score_lo=0.25, score_hi=0.75)
        read = check(dataclasses.replace(finding, rows=[row])._repr_html_())
    if kind is AdapterComparison:
        assert "0.250 to 0.750" in read.text
        return
    assert [tag for tag, _ in read.elements].count("svg") >= 1
    assert re.search(r"\[[+−]?(0\.25|25\.0|0\.75)\S*, [+−]?(0\.75|75\.0|0\.25)\S*\]", read.text)


@pytest.mark.parametrize("kind", FINDINGS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("long", [0, 40, 400])
def test_any_amount_stays_small(kind, long):
    sized = {0: lambda: made(kind, long=0), 40: lambda: made(kind, long=40), 400: lambda: _long(kind)}
    check(sized[long]()._repr_html_())


def _long(kind: type) -> typing.Any:
    """A finding whose own lists are very long; what is inside them is not."""
    finding = made(kind)
    grown = {
        one.name: value * 2000
        for one in dataclasses.fields(kind)
        if isinstance(value := getattr(finding, one.name), list) and one.name not in ("rankings", "by_family")
    }
    return dataclasses.replace(finding, **grown)


def test_what_is_left_out_is_counted():
    read = check(card_html(Card("Many", tables=[Table(("a",), [(one,) for one in range(5000)])])))
    assert "… and 4,940 more rows" in read.text
    read = check(card_html(Card("Many", lists={"texts": ["x" * 5000] * 900})))
    assert "texts (900)" in read.text and "more" in read.text


def test_nothing_measured_is_a_dash_and_draws_nothing():
    rows = [
        ("a", Measured(None, (0.1, 0.2))),
        ("b", Measured(float("nan"), None)),
        ("c", Measured(0.5, (None, 1))),
    ]
    read = check(card_html(Card("Empty", tables=[Table(("", "x"), rows)])))
    assert read.text.count("–") == 2 and "0.500" in read.text
    assert not [tag for tag, _ in read.elements if tag == "svg"]
    assert "–" not in check(card_html(Card("Nothing at all"))).text


def _marks(table: Table) -> list[float]:
    """Places of the estimates, from left to right in pixels."""
    html = card_html(Card("Marks", tables=[table]))
    return [float(one) for one in re.findall(r'cx="([\d.]+)"', html)]


def test_marks_stand_in_the_order_of_their_numbers():
    rows = [(Measured(value, (value - 0.1, value + 0.1)),) for value in (-1.0, 0.0, 3.0)]
    low, mid, high = _marks(Table(("x",), rows))
    assert low < mid < high
    assert (mid - low) / (high - mid) == pytest.approx(1 / 3, rel=0.02)


def test_scales_are_shared_as_asked():
    def rows() -> list[tuple[Measured, Measured]]:
        return [(Measured(1.0, (0.9, 1.1)), Measured(10.0, (9.0, 11.0)))]

    columns = _marks(Table(("a", "b"), rows()))
    assert columns[0] == columns[1]
    together = _marks(Table(("a", "b"), rows(), scale="table"))
    assert together[0] < together[1]
    down = [(Measured(1.0, (0.9, 1.1)),), (Measured(10.0, (9.0, 11.0)),)]
    assert len(set(_marks(Table(("a",), down)))) == 2
    assert len(set(_marks(Table(("a",), down, scale="cell")))) == 1


def test_what_lies_outside_the_scale_is_hollow_at_its_edge():
    rows = [(Measured(value, (value - 0.1, value + 0.1)),) for value in (0.5, -90.0)]
    html = card_html(Card("Marks", tables=[Table(("x",), rows, within=(-0.5, 1.0))]))
    assert html.count('fill="none" stroke="currentColor"/></svg>') == 1
    inside, outside = _marks(Table(("x",), rows, within=(-0.5, 1.0)))
    assert outside == 4.0 < inside


def test_a_side_has_its_colour():
    rows = [("base", Measured(0.5, (0.4, 0.6))), ("tuned", Measured(0.7, (0.6, 0.8)))]
    read = check(card_html(Card("Sides", tables=[Table(("", "x"), rows, sides=("base", HOSTILE))])))
    assert [
        attributes["class"] for tag, attributes in read.elements if tag == "svg" and "class" in attributes
    ] == ["base"]


# ---------------------------------------------------------------- what wraps models, tensors and folders


@pytest.fixture(scope="module")
def base(tiny_llama):
    return tiny_llama()


def test_models_say_what_they_are_and_hold(base):
    model = load_model(base)
    read = check(model._repr_html_())
    assert "LlamaForCausalLM" in read.text and str(base)[-20:] in read.text
    pair = load_pair(base, base)
    assert {"base", "tuned"} <= set(check(pair._repr_html_()).text.split())
    pair.notes.append(HOSTILE)
    assert "<script>" in check(pair._repr_html_()).text


def test_a_corpus_says_what_its_last_pass_read(tmp_path, tiny_tokenizer):
    path = tmp_path / "text.txt"
    path.write_text("river mill\ncounts sacks\n")
    corpus = Corpus(path, tiny_tokenizer, name=HOSTILE)
    assert "read:" not in check(corpus._repr_html_()).text
    list(corpus.documents())
    assert "read: documents 1" in check(corpus._repr_html_()).text


def test_a_dictionary_shows_no_weights():
    metadata = {
        "site": "resid_post.0",
        "model": HOSTILE,
        "metrics": {"fve": 0.75, HOSTILE: 1.0},
        "recipe": {"x": HOSTILE},
    }
    dictionary = Dictionary(16, 64, k=4, metadata=metadata)
    read = check(dictionary._repr_html_())
    assert "0.75" in read.text and "resid_post.0" in read.text and "<script>" in read.text
    assert "Crosscoder" in Dictionary(16, 64, k=4, models=2, view="pair")._repr_html_()
    codes = dictionary.encode(torch.randn(1000, 16))
    read = check(codes._repr_html_())
    assert "1,000" in read.text and "4,000" in read.text
    assert len(codes._repr_html_()) == len(dictionary.encode(torch.randn(1000, 16))._repr_html_())
    empty = Codes(torch.zeros(1, dtype=torch.long), torch.zeros(0, dtype=torch.long), torch.zeros(0), 64)
    assert "tokens" in check(empty._repr_html_()).text


def test_a_store_says_what_it_holds(tmp_path):
    from palimpsest.store import StoreWriter

    with RunFolder(tmp_path / "store", stage="store", config={}, inputs={}) as run:
        writer = StoreWriter(
            run, sites=["resid_post.0"], models=("base", "tuned"), d_model=8, dtype="float32"
        )
        labels = {name: torch.arange(5, dtype=torch.int32) for name in ("token_ids", "document", "position")}
        writer.append({"resid_post.0": torch.ones(5, 2, 8)}, **labels)
        writer.finish()
    read = check(ActivationStore(tmp_path / "store")._repr_html_())
    assert "resid_post.0" in read.text and "rows 5" in read.text


def test_a_battery_says_what_it_holds(tmp_path):
    battery = Battery.__new__(Battery)
    battery.path = tmp_path
    row = {
        "name": HOSTILE,
        "role": "task",
        "documents": 3,
        "tokens": 50,
        "aside_documents": 1,
        "aside_tokens": 9,
    }
    battery.description = {
        "corpora": [row],
        "base": {"path": HOSTILE},
        "loss": True,
        "activations": False,
        "max_length": 64,
    }
    battery.readers = [ReaderEntry(HOSTILE, "resid_post.0", HOSTILE, None, False)]
    read = check(battery._repr_html_())
    assert "codes, losses" in read.text and "<script>" in read.text and "activations" not in read.text


def test_latents_show_what_fires_most(tmp_path):
    from latents_fixture import make_examples
    from palimpsest.latents import LatentIndex

    index = LatentIndex.open(make_examples(tmp_path / "examples", hostile=True))
    read = check(index._repr_html_())
    assert "of 200" in read.text and "resid_post.1" in read.text and "␣word" in read.text
    rates = [float(one) for one in re.findall(r" (\d+\.\d\d)% ", read.text)]
    assert rates[0] == max(rates) > 0


def test_a_text_read_shows_a_row_per_token():
    from palimpsest.interpret.text_reading import TextReading

    firing = [[(7, 1.5), (3, 0.5)], []]
    found = TextReading([HOSTILE, " mill"], firing, firing, None, [None, 2.5], None, cut=True)
    read = check(found._repr_html_())
    assert "7 (1.5), 3 (0.5)" in read.text and "␣mill" in read.text and "2.5" in read.text
    assert "tuned" not in read.text and "went on" in read.text
    long = TextReading([HOSTILE] * 1024, firing[:1] * 1024, None, None, [1.0] * 1024, [1.0] * 1024)
    assert "more rows" in check(long._repr_html_()).text


# ---------------------------------------------------------------- folders of every stage


def _folder(path: Path, stage: str, files: dict[str, typing.Any], **said: typing.Any):
    with RunFolder(
        path, stage=stage, config={}, inputs={"corpus": {"path": HOSTILE, "sha256": "0" * 64}}
    ) as run:
        for name, content in files.items():
            run.write_json(name, content)
        return run.finish(**said)


def test_a_folder_shows_its_figures_with_their_intervals(tmp_path):
    general = {"kl": 0.02, "ci": [0.01, 0.03], "loss_before": 3.0, "loss_after": 3.5}
    result = {
        "model": HOSTILE,
        "objective_value": OBJECTIVE,
        "margin": None,
        "general": general,
        "parameters": 4096,
    }
    read = check(_folder(tmp_path / "tune", "tune", {"tune.json": result})._repr_html_())
    assert "−0.5000" in read.text and "[−0.7500, −0.2500]" in read.text and "KL from the base" in read.text
    assert [tag for tag, _ in read.elements].count("svg") == 2
    assert "4,096" in read.text and "<script>" in read.text


@pytest.mark.parametrize("stage", [*NOTABLE, "of-a-later-version"])
def test_a_folder_of_any_stage_has_a_card(stage, tmp_path):
    name, paths = NOTABLE.get(stage, ("other.json", ()))
    content: dict[str, typing.Any] = {}
    for path in paths:
        first, _, rest = path.partition(".")
        content[first] = [{rest: HOSTILE}] if rest else HOSTILE
    artifact = _folder(tmp_path / "run", stage, {name: content})
    read = check(artifact._repr_html_())
    assert stage in read.text and name in read.text and "<script>" in read.text
    assert set(contents(artifact)) == {path.partition(".")[0] for path in paths}


def test_an_unfinished_folder_says_so(tmp_path):
    with RunFolder(tmp_path / "run", stage="diff", config={}, inputs={}):
        pass
    artifact = open_artifact(tmp_path / "run", allow_running=True)
    assert "Unfinished" in check(artifact._repr_html_()).text


def test_what_a_stage_says_is_taken_from_its_file_and_nothing_else(tmp_path):
    artifact = _folder(
        tmp_path / "a", "diff-compare", {"compare.json": {"rows": [{"name": "x"}], "site": "s", "z": 1}}
    )
    assert contents(artifact) == {"rows": ["x"], "site": "s"}
    artifact = _folder(tmp_path / "b", "calibration", {"nulls.json": [{"name": "x"}]}, summary="24 nulls.")
    assert contents(artifact) == {"summary": "24 nulls."}
    assert contents(_folder(tmp_path / "c", "diff", {"other.json": {}})) == {}
    assert contents(_folder(tmp_path / "d", "diff", {"diff.json": ["no", "object"]})) == {}


# ---------------------------------------------------------------- nothing is forgotten

NO_RESULT = re.compile(
    r"Config$|Options$|Error$|^Objective$|^Partition$|^ShuffleBuffer$|^Harvester$|^Change$|^Query$|^Steerer$"
)


def test_every_public_result_has_a_card():
    found = [
        one
        for name in palimpsest.__all__
        if inspect.isclass(one := getattr(palimpsest, name)) and not NO_RESULT.search(name)
    ]
    assert len(found) >= 9
    assert [one.__name__ for one in found if not hasattr(one, "_repr_html_")] == []


def test_every_card_is_written():
    """A class that inherits `Rich` says what is on its card."""
    pending, kinds = [Rich], []
    for module in (
        "palimpsest.latents",
        "palimpsest.interpret.text_reading",
        "palimpsest.interpret.steering",
    ):
        try:
            import_module(module)
        except ModuleNotFoundError:
            continue
    while pending:
        kinds += (below := pending.pop().__subclasses__())
        pending += below
    assert len(kinds) >= 15
    assert [kind.__name__ for kind in kinds if kind._card is Rich._card] == []
    with pytest.raises(NotImplementedError, match="Bare"):
        type("Bare", (Rich,), {})()._repr_html_()


def test_codes_keep_their_slots():
    codes = Codes(torch.zeros(1, dtype=torch.long), torch.zeros(0, dtype=torch.long), torch.zeros(0), 64)
    assert not hasattr(codes, "__dict__")


def test_the_limit_is_the_one_that_is_promised():
    assert LIMIT < 100_000
