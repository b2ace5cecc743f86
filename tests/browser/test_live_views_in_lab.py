"""What the page makes of the numbers it is sent, in a real JupyterLab: StageChain, Bars and SavePicture."""

import ast
import re
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from xml.etree import ElementTree

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook
from PIL import Image
from playwright.sync_api import Locator, expect
from run_notebooks import METADATA

from .lab_page import SECONDS, LabPage

SETUP = '''
import torch
from IPython.display import display
from matplotlib.figure import Figure
from sft_edu import Trace, sft_microbatch_train_step
from sft_edu.widgets import Bars, SavePicture, StageChain

def stages_of(G):
    """The worked example of the course notes."""
    log_probs = torch.tensor([[-0.5, -0.3, -0.8, -0.2], [-0.4, -0.6, -0.3, -0.5]], requires_grad=True)
    trace = Trace()
    sft_microbatch_train_step(log_probs, torch.tensor([[1, 1, 0, 1], [1, 1, 1, 1]]), G, tap=trace)
    stages = []
    for row in trace.rows()[2:]:
        symbolic, _, numeric = row.formula.partition(" = ")
        value = f"{float(row.value.min()):.4f}" + (" or 0" if row.name == "backward" else "")
        value = "7" if row.name == "num_tokens" else value
        stages.append(dict(step=row.step, name=row.name, symbolic=symbolic, numeric=numeric, value=value))
    return stages

def rows_of(values):
    names = ["notes", "microbatch_mean", "sequence_mean", "microbatch_token_mean", "token_mean"]
    return [dict(label=n, value=v, text=f"{v:.2f}x", colour=n, note="of all") for n, v in zip(names, values)]

def picture():
    figure = Figure(figsize=(2, 1))
    figure.text(0.1, 0.5, "-2.8000")
    return figure

def fail():
    raise ArithmeticError("<b>no picture</b>")

def explain(change):
    with chain.hold_sync():
        chain.detail = [f"about {change['new']}", "in two lines"] if change["new"] else []
        chain.drawn += 1'''
CHAIN = """
chain = StageChain(stages=stages_of(2), words="Each of the 7 response tokens gets the gradient -0.2500.")
chain.observe(explain, "selected")
display(chain)"""
BARS = """
bars = Bars(title="against the full batch", rows=rows_of([0.25, 1.75, 1.0, 0.93, 1.0]), limits=[0, 1.5],
            reference=1.0, reference_label="full batch 1.00x", words="notes is a quarter of it.")
display(bars)"""
SAVE = """
save = SavePicture(picture, "step", description="the <sum>", title="One step")
display(save, SavePicture(fail))"""

FORMULAS = ["Σ m", "Σ m·log p / c", "-S / G", "L / G", "-m / (c·G²)", "ℓ without its graph"]
VALUES = ["7", "-2.8000", "1.4000", "0.7000", "-0.2500 or 0", "0.7000"]


@pytest.fixture(scope="module")
def notebook(lab: LabPage) -> Iterator[LabPage]:
    cells = [new_code_cell(source.strip()) for source in (SETUP, CHAIN, BARS, SAVE)]
    nbformat.write(new_notebook(cells=cells, metadata=METADATA), lab.server.folder / "live_views.ipynb")
    lab.open("live_views.ipynb")
    yield lab
    lab.close()


@pytest.fixture
def page(notebook: LabPage) -> Iterator[LabPage]:
    """The views as they are made by running the notebook again."""
    notebook.run_all()
    yield notebook
    assert notebook.errors() == []
    assert notebook.console_errors == []


def kernel(lab: LabPage, code: str, wanted: str = "None") -> object:
    """Run code in the notebook's kernel, without a cell, and fetch a value."""
    script = """async ([code, wanted]) => {
      const kernel = window.jupyterapp.shell.currentWidget.sessionContext.session.kernel;
      const request = { code, user_expressions: { wanted }, store_history: false };
      return (await kernel.requestExecute(request).done).content;
    }"""
    reply = lab.page.evaluate(script, [code, wanted])
    assert reply["status"] == "ok", reply
    answer = reply["user_expressions"]["wanted"]
    assert answer["status"] == "ok", answer
    return ast.literal_eval(answer["data"]["text/plain"])


def await_kernel(lab: LabPage, wanted: str, expected: object) -> None:
    """A second change by hand waits in the page until the kernel is done with the first."""
    for _ in range(50):
        if kernel(lab, "", wanted) == expected:
            return
        lab.page.wait_for_timeout(100)
    assert kernel(lab, "", wanted) == expected


@contextmanager
def second_view(lab: LabPage, source: str) -> Iterator[None]:
    """Show widgets once more, in a cell that is gone afterwards."""
    notebook = "window.jupyterapp.shell.currentWidget.content"
    lab.command("notebook:insert-cell-below")
    lab.page.evaluate(f"source => {notebook}.activeCell.model.sharedModel.setSource(source)", source)
    lab.command("notebook:run-cell")
    yield
    lab.page.evaluate(
        f"""source => {notebook}.model.sharedModel.deleteCell(
          {notebook}.widgets.findIndex(cell => cell.model.sharedModel.getSource() === source))""",
        source,
    )


def count_nodes(root: Locator) -> int:
    return root.evaluate("""root => {
      const walker = document.createTreeWalker(root, NodeFilter.SHOW_ALL);
      let count = 0;
      while (walker.nextNode()) count++;
      return count;
    }""")


def test_the_chain_shows_the_worked_example(page: LabPage):
    chain = page.page.locator(".sft-edu-chain")
    boxes = chain.get_by_role("button")
    expect(boxes).to_have_count(6)
    expect(chain.locator(".sft-edu-chain-value")).to_have_text(VALUES)
    expect(chain.locator(".sft-edu-chain-symbolic")).to_have_text(FORMULAS)
    expect(boxes.nth(2)).to_have_accessible_name("3 loss -S / G = -(-2.8000) / 2 1.4000")
    expect(chain.get_by_role("status")).to_have_text("Each of the 7 response tokens gets the gradient -0.2500.")
    cut = "box => [...box.querySelectorAll('span')].filter(s => s.scrollWidth > s.clientWidth).map(s => s.textContent)"
    assert chain.evaluate(cut) == []


def test_the_chain_is_driven_by_keys_and_by_code(page: LabPage):
    chain = page.page.locator(".sft-edu-chain")
    boxes, keyboard = chain.get_by_role("button"), page.page.keyboard
    cells = page.page.locator(".jp-Cell").count()
    assert [box.get_attribute("tabindex") for box in boxes.all()] == ["0"] + ["-1"] * 5
    boxes.first.focus()
    for key in ("ArrowRight", "ArrowRight", "ArrowLeft", "x", "Enter"):
        keyboard.press(key)
    expect(boxes.nth(1)).to_be_focused()
    expect(boxes.nth(1)).to_have_attribute("aria-pressed", "true")
    expect(chain.locator(".sft-edu-chain-line")).to_have_text(["about masked_sum", "in two lines"])
    expect(chain.get_by_role("status")).to_have_text("2 masked_sum. about masked_sum. in two lines")
    await_kernel(page, "chain.selected", "masked_sum")
    keyboard.press("End")
    keyboard.press("Space")
    expect(chain.locator(".sft-edu-chain-head")).to_have_text("6 returned_loss")
    expect(boxes.nth(1)).to_have_attribute("aria-pressed", "false")
    assert [box.get_attribute("tabindex") for box in boxes.all()] == ["-1"] * 5 + ["0"]
    keyboard.press("Space")
    expect(chain.locator("[aria-pressed=true]")).to_have_count(0)
    expect(chain.locator(".sft-edu-chain-line")).to_have_count(0)
    await_kernel(page, "chain.selected", "")
    kernel(page, "chain.selected = 'loss'")
    expect(boxes.nth(2)).to_have_attribute("aria-pressed", "true")
    expect(boxes.nth(5)).to_be_focused()
    boxes.nth(2).click()
    expect(boxes.nth(2)).to_have_attribute("aria-pressed", "false")
    assert page.page.locator(".jp-Cell").count() == cells  # x did not cut any


def test_updates_move_numbers_and_nothing_else(page: LabPage):
    chain, bars = page.page.locator(".sft-edu-chain"), page.page.locator(".sft-edu-bars")
    chain.get_by_role("button").first.click()
    expect(chain.locator(".sft-edu-chain-line")).to_have_count(2)
    before = {root: (count_nodes(root), root.bounding_box()) for root in (chain, bars)}
    box = chain.get_by_role("button").nth(3).bounding_box()
    track = bars.locator(".sft-edu-bars-track").first.bounding_box()
    spoken = chain.get_by_role("status").evaluate_handle("""status => {
      const texts = [];
      new MutationObserver(() => texts.push(status.textContent)).observe(status, { childList: true });
      return texts;
    }""")
    kernel(
        page,
        """
chain.drawn = bars.drawn = 0
for index in range(1, 201):
    with chain.hold_sync():
        chain.stages, chain.words, chain.detail = stages_of(index), f"G is {index}.", [f"{index}", "of 200"]
        chain.drawn += 1
    with bars.hold_sync():
        bars.rows, bars.words = rows_of([index / 100, 1.75, 1, 10.0 ** index, 0]), f"G is {index}."
        bars.drawn += 1""",
    )
    for root in (chain, bars):
        expect(root).to_have_attribute("data-drawn", "200")
        assert (count_nodes(root), root.bounding_box()) == before[root]
    assert chain.get_by_role("button").nth(3).bounding_box() == box
    assert bars.locator(".sft-edu-bars-track").first.bounding_box()["x"] == track["x"]
    values = chain.locator(".sft-edu-chain-value").all_inner_texts()
    assert values == kernel(page, "", "[stage['value'] for stage in chain.stages]")
    expect(chain.get_by_role("status")).to_have_text("G is 200.")
    said = spoken.json_value()
    assert len(said) < 20, said  # of 200


def test_a_count_is_written_when_all_of_its_message_is_drawn(page: LabPage):
    """The order of the traits in a message is arbitrary, so every order of arrival is watched."""
    chain = page.page.locator(".sft-edu-chain")
    seen = chain.evaluate_handle("""root => {
      const seen = [];
      const loss = root.querySelectorAll('.sft-edu-chain-value')[2];
      const words = root.querySelector('.sft-edu-words');
      const note = () => seen.push([root.dataset.drawn, loss.textContent, words.textContent]);
      new MutationObserver(note).observe(root, { attributeFilter: ['data-drawn'] });
      return seen;
    }""")
    for number, names in enumerate(["drawn stages words", "stages words drawn", "words drawn stages"], start=4):
        kernel(
            page,
            f"""
state = dict(drawn={number}, stages=stages_of({number}), words="G is {number}")
state = {{name: state[name] for name in {names.split()}}}
chain._send(dict(method="update", buffer_paths=[], state=state))""",
        )
        expect(chain).to_have_attribute("data-drawn", str(number))
    assert seen.json_value() == [[str(number), f"{2.8 / number:.4f}", f"G is {number}"] for number in (4, 5, 6)]


def test_bars_are_as_long_as_the_values_say(page: LabPage):
    bars = page.page.locator(".sft-edu-bars")
    track = bars.locator(".sft-edu-bars-track").first.bounding_box()
    fills = bars.locator(".sft-edu-bars-fill")

    def lengths() -> list[float]:
        return [round(fill.bounding_box()["width"] / track["width"], 2) for fill in fills.all()]

    assert lengths() == [0.17, 1.0, 0.67, 0.62, 0.67]
    assert fills.nth(1).get_attribute("data-beyond") == "high"
    line = bars.locator(".sft-edu-bars-reference").bounding_box()
    assert line["x"] + line["width"] / 2 == pytest.approx(track["x"] + track["width"] * 2 / 3, abs=1)

    kernel(page, "bars.limits = [-1, 1]; bars.reference = 5.0; bars.rows = rows_of([-0.5, 0.5, -2, 0, 1])")
    expect(fills.nth(2)).to_have_attribute("data-beyond", "low")
    assert lengths() == [0.25, 0.25, 0.5, 0.0, 0.5]
    assert fills.nth(0).bounding_box()["x"] == pytest.approx(track["x"] + track["width"] / 4, abs=1)
    expect(bars.locator(".sft-edu-bars-reference")).to_be_hidden()
    expect(bars.locator(".sft-edu-bars-reference-label")).to_have_text("full batch 1.00x ▸")

    kernel(page, "bars.limits = [0.01, 100]; bars.log = True; bars.rows = rows_of([1, 0.01, -3, 10, 0])")
    expect(fills.nth(2)).to_have_attribute("data-empty", "true")
    assert lengths() == [0.5, 0.0, 0.0, 0.75, 0.0]
    assert bars.locator(".sft-edu-bars-tick-text:visible").all_inner_texts() == ["0.01", "0.1", "1", "10", "100"]
    expect(bars.get_by_role("cell")).to_have_text(["1.00x", "0.01x", "-3.00x", "10.00x", "0.00x"])


def test_bars_are_a_table_for_those_who_cannot_see_them(page: LabPage):
    table = page.page.get_by_role("table", name="against the full batch; reference line: full batch 1.00x")
    expect(table.get_by_role("row")).to_have_count(5)
    expect(table.get_by_role("rowheader").nth(4)).to_have_accessible_name("token_mean of all")
    expect(table.get_by_role("cell")).to_have_text(["0.25x", "1.75x", "1.00x", "0.93x", "1.00x"])
    kernel(page, "bars.rows = rows_of([0.5]); bars.title = 'other'; bars.reference = None")
    expect(page.page.get_by_role("table", name="other").get_by_role("row")).to_have_count(1)


def test_hostile_text_stays_text(page: LabPage):
    hostile = '<img src=x onerror="window.hurt = 1"><script>window.hurt = 1</script>&amp;\u202e'
    kernel(
        page,
        f"""
t = {hostile!r}
chain.stages = [dict(step=t, name=t, symbolic=t, numeric=t, value=t)]
chain.selected, chain.detail, chain.words = t, [t], t
bars.rows = [dict(label=t, value=1.0, text=t, colour="notes", note=t)]
bars.title = bars.reference_label = bars.words = t""",
    )
    chain, bars = page.page.locator(".sft-edu-chain"), page.page.locator(".sft-edu-bars")
    expect(chain.locator(".sft-edu-words")).to_have_text(hostile)
    expect(bars.locator(".sft-edu-words")).to_have_text(hostile)
    for part in ("value", "line", "numeric"):
        expect(chain.locator(f".sft-edu-chain-{part}")).to_contain_text(hostile)
    for part in ("title", "label", "note", "text", "reference-label"):
        expect(bars.locator(f".sft-edu-bars-{part}")).to_have_text(hostile)
    for root in (chain, bars):
        assert root.locator("img, script").count() == 0
        assert root.evaluate("root => root.scrollWidth <= root.clientWidth + 1")
    assert page.page.evaluate("window.hurt") is None


def test_two_views_of_one_widget_agree_and_only_one_downloads(page: LabPage):
    with second_view(page, "display(chain, bars, save)"):
        chains, bars = page.page.locator(".sft-edu-chain"), page.page.locator(".sft-edu-bars")
        expect(chains).to_have_count(2)
        chains.nth(1).get_by_role("button").nth(2).click()
        expect(chains.nth(0).get_by_role("button").nth(2)).to_have_attribute("aria-pressed", "true")
        kernel(
            page, "chain.stages = stages_of(4); bars.rows = rows_of([0.5, 1, 1, 1, 1]); bars.drawn = chain.drawn = 77"
        )
        for index in range(2):
            expect(chains.nth(index)).to_have_attribute("data-drawn", "77")
            expect(bars.nth(index)).to_have_attribute("data-drawn", "77")
            assert chains.nth(index).locator(".sft-edu-chain-value").nth(2).inner_text() == "0.7000"
            assert bars.nth(index).get_by_role("cell").first.inner_text() == "0.50x"
            assert chains.nth(index).locator(".sft-edu-chain-line").first.inner_text() == "about loss"
        downloads = []
        page.page.on("download", lambda download: downloads.append(download))
        saves = page.page.locator(".sft-edu-save")
        saves.last.get_by_role("button", name="save SVG").click()
        expect(saves.last.get_by_role("status")).to_have_text("saved step.svg")
        expect(saves.first.get_by_role("status")).to_have_text("")
        page.page.wait_for_timeout(300)
        assert len(downloads) == 1


def test_a_picture_is_downloaded(page: LabPage):
    save = page.page.locator(".sft-edu-save").first
    with page.page.expect_download(timeout=20 * SECONDS) as download:
        save.get_by_role("button", name="save PNG").click()
    assert download.value.suggested_filename == "step.png"
    with Image.open(BytesIO(download.value.path().read_bytes())) as image:
        image.load()
        assert (image.size, image.info["Description"]) == ((400, 200), "the <sum>")
    with page.page.expect_download(timeout=20 * SECONDS) as download:
        save.get_by_role("button", name="save SVG").press("Enter")
    assert download.value.suggested_filename == "step.svg"
    root = ElementTree.fromstring(download.value.path().read_bytes())
    assert [root[0].text, root[1].text] == ["One step", "the <sum>"]
    assert "-2.8000" in "".join(root.itertext())


def test_a_picture_that_fails_says_why(page: LabPage):
    save = page.page.locator(".sft-edu-save").nth(1)
    save.get_by_role("button", name="save PNG").click()
    expect(save.get_by_role("status")).to_have_text("⚠ Not saved. ArithmeticError: <b>no picture</b>")


def test_a_closed_view_leaves_the_page_and_the_kernel(page: LabPage):
    expect(page.page.locator(".sft-edu-bars")).to_have_count(1)
    alive = kernel(
        page,
        """
import gc, weakref
gone = [weakref.ref(view) for view in (bars, save)]
bars.close(), save.close()
del bars, save
gc.collect()""",
        "[ref() is not None for ref in gone]",
    )
    assert alive == [False, False]
    expect(page.page.locator(".sft-edu-bars")).to_have_count(0)
    kernel(page, "chain.stages = stages_of(8)")
    expect(page.page.locator(".sft-edu-chain-value").nth(2)).to_have_text("0.3500")


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_every_text_can_be_read_in_either_theme(page: LabPage, theme: str):
    page.theme(theme)
    page.page.locator(".sft-edu-chain").get_by_role("button").nth(2).click()
    expect(page.page.locator(".sft-edu-chain-line")).to_have_count(2)
    contrasts = page.page.evaluate("""() => {
      const number = colour => colour.match(/[\\d.]+/g).map(Number);
      const light = colour => number(colour).slice(0, 3).map(c => c / 255)
        .map(c => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4))
        .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
      const behind = node => {
        for (; node; node = node.parentElement) {
          const colour = getComputedStyle(node).backgroundColor;
          if ((number(colour)[3] ?? 1) > 0) return colour;
        }
      };
      const found = {};
      for (const root of document.querySelectorAll('.sft-edu-chain, .sft-edu-bars, .sft-edu-save')) {
        for (const node of root.querySelectorAll('*')) {
          if (node.children.length || !node.textContent || !node.checkVisibility()) continue;
          const [a, b] = [getComputedStyle(node).color, behind(node)].map(light).sort((x, y) => y - x);
          found[node.className] = Math.min(found[node.className] ?? 99, (a + 0.05) / (b + 0.05));
        }
      }
      return found;
    }""")
    page.theme("light")
    assert len(contrasts) >= 12
    assert {name: ratio for name, ratio in contrasts.items() if ratio < 4.5} == {}


def test_the_chain_wraps_by_the_room_it_has(page: LabPage):
    row = page.page.locator(".sft-edu-chain-row")
    lefts = "row => new Set([...row.children].map(cell => Math.round(cell.getBoundingClientRect().left))).size"
    columns = {}
    for width in (1100, 700, 400):
        row.locator("..").evaluate("(root, width) => { root.style.width = `${width}px` }", width)
        columns[width] = row.evaluate(lefts)
        cut = row.evaluate(
            "row => [...row.querySelectorAll('.sft-edu-chain-value')].filter(v => v.scrollWidth > v.clientWidth).length"
        )
        assert cut == 0, width
    assert columns == {1100: 6, 700: 3, 400: 2}
    assert re.fullmatch(
        r"(\S+ ){0,2}tabular-nums( \S+){0,2}", row.evaluate("r => getComputedStyle(r).fontVariantNumeric")
    )
