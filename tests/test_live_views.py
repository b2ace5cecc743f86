"""The views that the page draws, and the files they save: the Python side."""

import gc
import io
import re
import subprocess
import sys
import weakref
import xml.etree.ElementTree as ElementTree

import matplotlib
import pytest
import traitlets
from matplotlib.figure import Figure
from PIL import Image

from sft_edu import RULES
from sft_edu.widgets import Bars, SavePicture, StageChain, bars

STAGES = [
    {"step": "1", "name": "num_tokens", "symbolic": "Σ m", "numeric": "3 + 4", "value": "7"},
    {"step": "3", "name": "loss", "symbolic": "-S / G", "numeric": "-(-2.8000) / 2", "value": "1.4000"},
    {"step": "6", "name": "returned_loss", "symbolic": "ℓ without its graph", "numeric": "", "value": "0.7000"},
]
ROWS = [
    {"label": "notes", "value": 0.25, "text": "0.25x", "colour": "notes", "note": "D = 16"},
    {"label": "token_mean", "value": 1, "text": "1.00x", "colour": "token_mean"},
]
SVG = "{http://www.w3.org/2000/svg}"


def picture() -> Figure:
    figure = Figure(figsize=(2, 1))
    figure.text(0.1, 0.5, "-2.8000")
    return figure


def views():
    return [
        StageChain(stages=STAGES),
        Bars(title="scale", rows=ROWS),
        SavePicture(picture, "step"),
    ]


def messages(view, monkeypatch) -> list[dict]:
    """The states that go to the page from now on."""
    sent = []
    monkeypatch.setattr(view, "_send", lambda message, buffers=None: sent.append(message["state"]))
    return sent


def test_a_chain_says_in_text_what_it_shows():
    chain = StageChain(stages=STAGES, selected="loss", detail=["one", "two"], words="In words.")
    assert repr(chain) == (
        "StageChain(selected='loss')\n"
        "1 num_tokens: Σ m = 3 + 4 -> 7\n"
        "3 loss: -S / G = -(-2.8000) / 2 -> 1.4000\n"
        "    one\n"
        "    two\n"
        "6 returned_loss: ℓ without its graph -> 0.7000\n"
        "In words."
    )
    assert repr(StageChain()) == "StageChain(selected='')"


def test_bars_say_in_text_what_they_show():
    view = Bars(
        title="scale", rows=ROWS, reference=1, reference_label="full batch", words="A quarter.", limits=[0, 1.5]
    )
    assert repr(view) == (
        "Bars: scale\n  notes       0.25x  D = 16\n  token_mean  1.00x\n  line at 1: full batch\nA quarter."
    )
    assert view.rows[1]["note"] == ""
    assert repr(Bars()) == "Bars: "


@pytest.mark.parametrize("view", views(), ids=lambda view: type(view).__name__)
def test_the_mime_bundle_has_the_whole_text_and_the_widget(view):
    bundle = view._repr_mimebundle_()
    data = bundle[0] if isinstance(bundle, tuple) else bundle
    assert data["text/plain"] == repr(view)
    assert "application/vnd.jupyter.widget-view+json" in data


@pytest.mark.parametrize("index", range(3))
def test_a_closed_view_is_forgotten(index):
    view = views()[index]
    gone = weakref.ref(view)
    view.close()
    del view
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize("view", [StageChain(stages=STAGES), Bars(rows=ROWS)], ids=["StageChain", "Bars"])
def test_what_is_set_together_travels_together(view, monkeypatch):
    sent = messages(view, monkeypatch)
    with view.hold_sync():
        view.words = "new"
        view.drawn += 1
    assert sent == [{"words": "new", "drawn": 1}]


def test_what_a_caller_does_to_his_list_later_changes_nothing():
    stages, rows = [dict(stage) for stage in STAGES], [dict(row) for row in ROWS]
    chain, view = StageChain(stages=stages), Bars(rows=rows)
    stages[0]["value"] = rows[0]["text"] = "changed"
    assert "changed" not in repr(chain) + repr(view)


@pytest.mark.parametrize(
    ("trait", "value", "complaint"),
    [
        ("stages", "loss", "stages"),
        ("stages", ["loss"], r"stages\[0\]: got 'loss'; expected a dict with the keys step, name, symbolic, numeric"),
        ("stages", [{**STAGES[0], "colour": "red"}], r"stages\[0\]: got .*; expected a dict with the keys step"),
        ("stages", [STAGES[0], {"step": "2"}], r"stages\[1\]: got \{'step': '2'\}; expected a dict"),
        ("stages", [{**STAGES[0], "value": 7}], r"stages\[0\]\['value'\]: got 7; expected a text"),
        ("stages", [STAGES[0], STAGES[0]], r"stages: got \['num_tokens', 'num_tokens'\]; expected names that are all"),
        ("stages", [{**STAGES[0], "name": ""}], "stages: .* not empty"),
        ("selected", "masked_sum", "selected: got 'masked_sum'; expected '' or one of num_tokens, loss, returned_loss"),
        ("selected", None, "selected"),
        ("detail", 3, "detail"),
        ("detail", ["one", 2], r"detail\[1\]: got 2; expected a text"),
        ("words", 3, "words"),
        ("drawn", "1", "drawn"),
        ("ahead", "G", "ahead"),
        ("inputs", None, "inputs"),
    ],
)
def test_a_chain_refuses_what_it_cannot_show(trait, value, complaint):
    chain = StageChain(stages=STAGES, selected="loss", detail=["one"])
    before = repr(chain)
    with pytest.raises(traitlets.TraitError, match=complaint):
        setattr(chain, trait, value)
    assert repr(chain) == before


@pytest.mark.parametrize(
    ("trait", "value", "complaint"),
    [
        ("rows", 3, "rows"),
        (
            "rows",
            [{"label": "a"}],
            r"rows\[0\]: got .*; expected a dict with the keys label, .* \(note may be left out\)",
        ),
        ("rows", [{**ROWS[0], "value": "1"}], r"rows\[0\]\['value'\]: got '1'; expected a finite number"),
        ("rows", [{**ROWS[0], "value": float("nan")}], r"rows\[0\]\['value'\]: got nan; expected a finite number"),
        ("rows", [{**ROWS[0], "value": float("inf")}], r"rows\[0\]\['value'\]: got inf; expected a finite number"),
        ("rows", [{**ROWS[0], "value": True}], r"rows\[0\]\['value'\]: got True"),
        (
            "rows",
            [ROWS[0], {**ROWS[0], "colour": "red"}],
            r"rows\[1\]\['colour'\]: got 'red'; expected one of neutral, ",
        ),
        ("rows", [{**ROWS[0], "colour": []}], r"rows\[0\]\['colour'\]: got \[\]"),
        ("limits", [1, 1], r"limits: got \[1, 1\]; expected \[low, high\] with low < high"),
        ("limits", [0, 1, 2], "limits"),
        ("limits", [0, float("inf")], "limits: got inf; expected a finite number"),
        ("limits", 5, "limits"),
        ("log", True, "log: got True; expected False while limits are"),
        ("log", "yes", "log"),
        ("reference", "1.00x", "reference: got '1.00x'; expected a finite number"),
        ("reference_label", 1, "reference_label"),
        ("title", None, "title"),
        ("words", 3.5, "words"),
    ],
)
def test_bars_refuse_what_they_cannot_show(trait, value, complaint):
    view = Bars(title="scale", rows=ROWS, reference=1.0)
    before = repr(view)
    with pytest.raises(traitlets.TraitError, match=complaint):
        setattr(view, trait, value)
    assert repr(view) == before


def test_a_logarithmic_axis_stays_above_0():
    view = Bars(log=True, limits=[0.01, 10])
    with pytest.raises(traitlets.TraitError, match=r"limits: got .*; expected low > 0 while log is True"):
        view.limits = [0, 10]
    with view.hold_trait_notifications():
        view.log, view.limits = False, [0, 1]
    assert (view.log, view.limits) == (False, [0, 1])


def test_other_stages_let_go_of_a_selection_they_do_not_have():
    chain = StageChain(stages=STAGES, selected="loss")
    chain.stages = [{**stage, "value": "0"} for stage in STAGES]
    assert chain.selected == "loss"
    chain.stages = STAGES[:1]
    assert chain.selected == ""


def test_the_page_is_told_when_the_observers_of_a_selection_have_run(monkeypatch):
    chain = StageChain(stages=STAGES)
    chain.observe(lambda change: chain.set_trait("detail", [f"about {change['new']}"]), "selected")
    sent = messages(chain, monkeypatch)
    chain.set_state({"selected": "loss"})
    assert [state for state in sent if "selected" not in state] == [{"detail": ["about loss"]}, {"_answered": "loss"}]
    sent.clear()
    with pytest.raises(traitlets.TraitError):
        chain.set_state({"selected": "unknown"})
    assert sent[-1] == {"selected": "loss"}
    chain.selected = "num_tokens"
    assert chain._answered == "num_tokens"


def test_half_a_surrogate_pair_does_not_break_the_message():
    chain, view = StageChain(stages=[{**STAGES[0], "value": "\ud800"}]), Bars(title="\udfff")
    (chain.stages[0]["value"] + view.title).encode()


def test_every_colour_is_in_the_style_sheet_and_every_rule_has_one():
    css = bars.Bars._css if isinstance(bars.Bars._css, str) else str(bars.Bars._css)
    assert set(re.findall(r'data-colour="(\w+)"', css)) == set(bars.COLOURS)
    assert set(RULES) < set(bars.COLOURS)


def test_a_saved_svg_has_real_text_a_title_and_a_description(tmp_path):
    hostile = "<script>alert('&')</script> \x00 ]]> ü"
    save = SavePicture(picture, "step", description=hostile, title="A <step>")
    path = save.to_file(tmp_path / "a.svg")
    root = ElementTree.fromstring(path.read_bytes())
    assert [child.tag for child in root[:2]] == [SVG + "title", SVG + "desc"]
    assert root[0].text == "A <step>"
    assert root[1].text == hostile.replace("\x00", "\ufffd")
    assert "-2.8000" in [text.text for text in root.iter(SVG + "text")]
    assert not list(root.iter(SVG + "script"))
    assert save.to_bytes("svg") == path.read_bytes()


def test_a_saved_png_has_the_description_in_its_metadata(tmp_path):
    said = []
    save = SavePicture(picture, "step", description=lambda: said.append(1) or "gradient -0.2500 · ℓ")
    with Image.open(save.to_file(str(tmp_path / "a.PNG"))) as image:
        assert (image.format, image.size) == ("PNG", (400, 200))
        assert image.info["Title"] == "step"
        assert image.info["Description"] == "gradient -0.2500 · ℓ"
    assert said == [1]


def test_a_file_is_overwritten_only_on_demand(tmp_path):
    made = []
    save = SavePicture(lambda: made.append(1) or picture(), "step")
    path = tmp_path / "a.svg"
    path.write_text("precious")
    with pytest.raises(FileExistsError, match=r"a\.svg exists; expected a new file, or overwrite=True"):
        save.to_file(path)
    assert (path.read_text(), made) == ("precious", [])
    save.to_file(path, overwrite=True)
    assert path.read_text().startswith("<?xml")
    with pytest.raises(ValueError, match=r"path: got 'a\.jpg'; expected a name that ends in \.png or \.svg"):
        save.to_file(tmp_path / "a.jpg")


def test_a_picture_that_fails_leaves_the_old_file_and_the_settings_alone(tmp_path):
    path = tmp_path / "a.svg"
    path.write_text("precious")
    before = dict(matplotlib.rcParams)
    with pytest.raises(ZeroDivisionError):
        SavePicture(lambda: 1 / 0, "step").to_file(path, overwrite=True)
    with pytest.raises(TypeError, match=r"make_figure: got NoneType; expected a matplotlib\.figure\.Figure"):
        SavePicture(lambda: None, "step").to_file(path, overwrite=True)
    assert path.read_text() == "precious"
    assert dict(matplotlib.rcParams) == before


def answers(save, monkeypatch, *asked) -> list[tuple[dict, list]]:
    sent = []
    monkeypatch.setattr(save, "send", lambda content, buffers=None: sent.append((content, buffers)))
    for message in asked:
        save._handle_custom_msg(message, [])
    return sent


def test_the_page_gets_the_file_it_asked_for(monkeypatch):
    save = SavePicture(picture, "step")
    asked = {"kind": "save", "format": "png", "request": "r1"}
    ((content, buffers),) = answers(save, monkeypatch, {"kind": "other"}, "text", asked)
    assert content == {"kind": "saved", "request": "r1", "file": "step.png"}
    with Image.open(io.BytesIO(buffers[0])) as image:
        assert image.format == "PNG"


@pytest.mark.parametrize(
    ("make", "file_format", "error"),
    [
        (lambda: 1 / 0, "svg", "ZeroDivisionError: division by zero"),
        (lambda: 3, "svg", "TypeError: make_figure: got int"),
        (picture, "exe", "ValueError: file_format: got 'exe'; expected one of png, svg"),
        (picture, None, "ValueError: file_format: got None"),
    ],
)
def test_the_page_is_told_what_went_wrong(monkeypatch, caplog, make, file_format, error):
    save = SavePicture(make, "step")
    asked = {"kind": "save", "format": file_format, "request": "r1"}
    ((content, buffers),) = answers(save, monkeypatch, asked)
    assert content["request"] == "r1"
    assert content["error"].startswith(error)
    assert buffers is None


@pytest.mark.parametrize("name", ["", "../step", "a/b", "a\\b", ".hidden", "a\n", "step.", "a:b", 3, None])
def test_a_name_that_is_no_file_name_is_refused(name):
    with pytest.raises(traitlets.TraitError, match="name"):
        SavePicture(picture, name)


def test_saving_never_imports_pyplot(tmp_path):
    code = (
        "import sys; from matplotlib.figure import Figure; from sft_edu.widgets import SavePicture;"
        "save = SavePicture(Figure, 'x'); save.to_bytes('png'); save.to_bytes('svg');"
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
