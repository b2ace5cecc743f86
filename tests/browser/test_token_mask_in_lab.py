"""What mouse, finger and keys do to a TokenMask in JupyterLab, and what the kernel knows of it."""

import json
import time
from collections.abc import Iterator

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook
from playwright.sync_api import Locator, expect
from run_notebooks import METADATA
from test_token_grid import contrast
from test_token_mask import HOSTILE

from sft_edu.widgets import TokenMask

from .lab_page import LabPage

CELLS = [
    """
from sft_edu.widgets import TokenMask
tokens = [list("apital␣of␣Peru?␣Lima"), list("+2?␣4")]
tokens = [row + ["<eos>"] + ["<pad>"] * (20 - len(row)) for row in tokens]
mask = [[0] * 16 + [1] * 5, [0] * 4 + [1] * 2 + [0] * 15]
values = [[-0.25 * bit for bit in row] for row in mask]
notes = [["log p -5.6500"] * 21] * 2
w = TokenMask(tokens, mask, values=values, value_name="gradient", notes=notes)
w""",
    "w",
    "big = TokenMask([['a'] * 128] * 16, [[0] * 128] * 16, values=[[0.0] * 128] * 16)\nbig",
    f"""
texts = [text + str(n) for n, text in enumerate({HOSTILE!r} * 25)]
hostile = TokenMask([texts], [[0] * 500], [["response"] * 500])
hostile""",
]
START = "0" * 16 + "1" * 5 + " " + "0" * 4 + "11" + "0" * 15


class Desk:
    """The open notebook, its widgets in order, and a line to the kernel."""

    def __init__(self, lab: LabPage):
        self.lab, self.page = lab, lab.page
        self.masks = [self.page.locator(".sft-edu-mask").nth(n) for n in range(len(CELLS))]

    def ask(self, code: str) -> str:
        """What the code prints in the kernel."""
        return self.page.evaluate(
            """async code => {
              const kernel = window.jupyterapp.shell.currentWidget.sessionContext.session.kernel;
              const request = kernel.requestExecute({ code });
              let text = '';
              request.onIOPub = ({ header, content }) => {
                if (header.msg_type === 'stream') text += content.text;
                if (header.msg_type === 'error') text += content.ename + content.evalue;
              };
              await request.done;
              return text.trim();
            }""",
            code,
        )

    def chips(self, n: int = 0) -> Locator:
        return self.masks[n].locator("button")

    def shown(self, n: int = 0) -> str:
        """The mask as the page shows it."""
        return self.masks[n].evaluate(
            """root => [...root.querySelectorAll('.sft-edu-mask-row')].map(row =>
              [...row.querySelectorAll('button')].map(chip => +(chip.ariaPressed === 'true')).join('')).join(' ')"""
        )

    def settle(self, expected: str, name: str = "w", n: int = 0) -> None:
        """Page and kernel come to show the expected mask, and stay with it."""
        code = f"print(' '.join(''.join(map(str, row)) for row in {name}.mask))"
        deadline = time.monotonic() + 10
        while (self.ask(code), self.shown(n)) != (expected, expected) and time.monotonic() < deadline:
            self.page.wait_for_timeout(20)
        self.page.wait_for_timeout(100)
        assert (self.ask(code), self.shown(n)) == (expected, expected)

    def said(self, n: int = 0) -> Locator:
        return self.masks[n].locator("[role=status]")

    def centre(self, index: int, n: int = 0) -> tuple[float, float]:
        box = self.chips(n).nth(index).bounding_box()
        return box["x"] + box["width"] / 2, box["y"] + box["height"] / 2

    def drag(self, *indices: int, n: int = 0, steps: int = 1) -> None:
        self.page.mouse.move(*self.centre(indices[0], n))
        self.page.mouse.down()
        for index in indices[1:]:
            self.page.mouse.move(*self.centre(index, n), steps=steps)
        self.page.mouse.up()

    def focused(self) -> int:
        return self.page.evaluate("Number(document.activeElement.dataset.index ?? -1)")


@pytest.fixture(scope="module")
def open_desk(lab: LabPage) -> Iterator[Desk]:
    cells = [new_code_cell(source.strip()) for source in CELLS]
    nbformat.write(new_notebook(cells=cells, metadata=METADATA), lab.server.folder / "token_mask.ipynb")
    lab.open("token_mask.ipynb")
    lab.run_all()
    yield Desk(lab)
    lab.theme("light")
    lab.close()


@pytest.fixture
def desk(open_desk: Desk) -> Iterator[Desk]:
    open_desk.ask("w.unobserve_all('mask'); w.mask = mask")
    open_desk.settle(START)
    open_desk.masks[0].scroll_into_view_if_needed()
    yield open_desk
    assert open_desk.lab.errors() == []
    assert open_desk.lab.console_errors == []


def with_ones(*indices: int, zeros: tuple[int, ...] = ()) -> str:
    digits = list(START.replace(" ", ""))
    for index in indices:
        digits[index] = "1"
    for index in zeros:
        digits[index] = "0"
    return "".join(digits[:21]) + " " + "".join(digits[21:])


def test_every_chip_says_what_it_is(desk: Desk):
    expect(desk.chips()).to_have_count(42)
    expect(desk.chips().nth(16)).to_have_accessible_name(
        "sequence 0, token 16: L, response, mask 1, gradient -0.2500, log p -5.6500"
    )
    expect(desk.chips().nth(41)).to_have_accessible_name(
        "sequence 1, token 20: <pad>, padding, mask 0, gradient 0, log p -5.6500"
    )
    desk.chips().nth(16).hover()
    expect(desk.masks[0].locator(".sft-edu-mask-readout")).to_contain_text("gradient -0.2500, log p -5.6500")
    assert desk.masks[0].locator("button[tabindex='0']").count() == 1
    unguarded = desk.masks[0].locator("[tabindex]:not([data-lm-suppress-shortcuts=true])")
    assert unguarded.count() == 0


def test_the_line_below_is_about_what_was_moved_last(desk: Desk):
    line, chips = desk.masks[0].locator(".sft-edu-mask-readout"), desk.chips()
    chips.nth(3).focus()
    chips.nth(9).hover()
    expect(line).to_contain_text("sequence 0, token 9:")
    desk.page.keyboard.press("ArrowRight")
    expect(line).to_contain_text("sequence 0, token 4:")
    desk.page.keyboard.press("Space")
    expect(line).to_contain_text("sequence 0, token 4: a, prompt, mask 1")
    desk.settle(with_ones(4))  # or the kernel may be asked before it heard of the key
    desk.ask("w.mask = mask")  # the pointer rests, whatever changes below it
    expect(line).to_contain_text("sequence 0, token 4: a, prompt, mask 0")
    x, y = desk.centre(9)
    desk.page.mouse.move(x + 1, y)
    expect(line).to_contain_text("sequence 0, token 9:")
    desk.page.keyboard.press("Shift+Tab")
    desk.page.keyboard.press("Tab")
    expect(line).to_contain_text("sequence 0, token 4:")
    desk.page.mouse.move(*desk.centre(10))
    expect(line).to_contain_text("sequence 0, token 10:")
    desk.page.mouse.move(0, 0)
    expect(line).to_contain_text("sequence 0, token 4:")


def test_a_click_flips(desk: Desk):
    desk.chips().nth(3).click()
    desk.settle(with_ones(3))
    expect(desk.said()).to_have_text("1 token set to 1")
    expect(desk.masks[0].locator(".sft-edu-mask-count")).to_have_text("mask = 1: 8 of 42 tokens")
    desk.chips().nth(3).click()
    desk.settle(START)


def test_a_drag_paints_what_it_crosses_in_the_state_of_the_first(desk: Desk):
    desk.drag(2, 7)  # one move of the mouse over six chips
    desk.settle(with_ones(*range(2, 8)))
    expect(desk.said()).to_have_text("6 tokens set to 1")
    desk.drag(18, 15, 3)
    desk.settle(with_ones(2, zeros=(16, 17, 18)))
    desk.drag(2, 23)
    desk.settle(with_ones(zeros=(2, 16, 17, 18)))


def test_a_drag_may_leave_the_grid(desk: Desk):
    x, y = desk.centre(0)
    desk.page.mouse.move(x, y)
    desk.page.mouse.down()
    desk.page.mouse.move(x - 60, y)
    desk.page.mouse.move(x - 60, y - 300)
    desk.page.mouse.up()
    desk.settle(with_ones(0))
    desk.page.mouse.move(*desk.centre(5))
    desk.settle(with_ones(0))


def test_shift_and_click_paint_a_range_in_reading_order(desk: Desk):
    desk.chips().nth(12).click()
    desk.chips().nth(22).click(modifiers=["Shift"])
    desk.settle(with_ones(*range(12, 23)))
    desk.chips().nth(25).click(modifiers=["Shift"])
    desk.settle(with_ones(*range(12, 26)))
    assert desk.focused() == 25


def test_keys_do_all_of_it(desk: Desk):
    keyboard = desk.page.keyboard
    desk.chips().nth(18).focus()
    for key, index in {"Home": 0, "End": 20, "ArrowLeft": 19, "ArrowDown": 40, "ArrowUp": 19}.items():
        keyboard.press(key)
        assert desk.focused() == index
    keyboard.press("ArrowDown")
    desk.page.wait_for_timeout(100)
    assert desk.ask("print(w.focused)") == "(1, 19)"
    keyboard.press("ArrowUp")
    keyboard.press("Home")
    keyboard.press("Space")
    desk.settle(with_ones(0))
    keyboard.press("Enter")
    desk.settle(START)
    keyboard.press("Space")
    keyboard.down("Shift")
    for _ in range(5):
        keyboard.press("ArrowRight")
    keyboard.press("ArrowLeft")  # the range shrinks
    keyboard.up("Shift")
    desk.settle(with_ones(*range(5)))
    expect(desk.said()).to_have_text("4 tokens set to 1")
    keyboard.press("Control+z")
    desk.settle(with_ones(0))
    keyboard.press("Control+Shift+z")
    desk.settle(with_ones(*range(5)))
    keyboard.press("Control+z")
    keyboard.press("Control+z")
    desk.settle(START)
    keyboard.press("Control+y")
    desk.settle(with_ones(0))
    keyboard.press("Tab")
    assert not desk.masks[0].evaluate("root => root.contains(document.activeElement)")


def test_undo_takes_back_one_stroke_and_not_what_the_kernel_did(desk: Desk):
    desk.drag(0, 4)
    desk.settle(with_ones(*range(5)))
    desk.ask("rows = [list(row) for row in w.mask]; rows[1][20] = 1; rows[0][0] = 0; w.mask = rows")
    desk.settle(with_ones(1, 2, 3, 4, 41))
    desk.page.keyboard.press("Control+z")
    desk.settle(with_ones(41))
    expect(desk.said()).to_have_text("4 tokens set back")


def test_a_focused_chip_keeps_labs_shortcuts_out(desk: Desk):
    count = "() => window.jupyterapp.shell.currentWidget.content.widgets.length"
    cells = desk.page.evaluate(count)
    for chip in (desk.chips().nth(5), desk.chips(1).nth(5)):
        chip.click()
        chip.click()
        for key in ("x", "a", "b", "d", "d", "y", "m", "Shift+M"):
            desk.page.keyboard.press(key)
        assert desk.page.evaluate(count) == cells
        assert desk.focused() == 5
    desk.settle(START)


def test_a_click_with_shift_selects_no_cells(desk: Desk):
    desk.page.locator(".jp-CodeCell .jp-InputArea-editor").nth(2).click()
    desk.page.keyboard.press("Escape")
    desk.chips().nth(0).click()
    desk.chips().nth(2).click(modifiers=["Shift"])
    assert desk.page.locator(".jp-Cell.jp-mod-multiSelected").count() == 0
    assert desk.page.evaluate("getSelection().toString()") == ""


def test_the_page_draws_before_the_kernel_answers_and_sends_once_per_frame(desk: Desk):
    sent = desk.page.evaluate(
        """async module => {
          const url = URL.createObjectURL(new Blob([module], { type: 'text/javascript' }));
          const { render } = (await import(url)).default;
          const state = { tokens: [['a', 'b', 'c']], mask: '000', labels: [['prompt', 'prompt', 'eos']],
            values: [], value_name: 'value', notes: [], focused: [0, 0] };
          const handlers = {}, sent = [];
          const model = {
            get: name => state[name],
            set: (name, value) => { state[name] = value; handlers[`change:${name}`]?.(); },
            save_changes: () => sent.push(state.mask),
            on: (name, handler) => { if (handlers[name]) throw Error('two for one trait'); handlers[name] = handler; },
            off: (name, handler) => { if (handlers[name] === handler) delete handlers[name]; },
          };
          const el = document.createElement('div');
          document.body.append(el);
          const cleanup = render({ model, el });
          const [first] = el.querySelectorAll('button');
          const press = () => first.dispatchEvent(new KeyboardEvent('keydown', { key: ' ', bubbles: true }));
          const seen = [];
          for (let i = 0; i < 3; i++) { press(); seen.push(first.ariaPressed); }
          const frame = () => new Promise(requestAnimationFrame);
          await frame(); await frame();
          const once = [...sent];
          press();
          first.click();
          press();
          cleanup();
          press();
          first.click();
          await frame(); await frame();
          const left = { handlers: Object.keys(handlers), children: el.childElementCount, pressed: first.ariaPressed };
          el.remove();
          return { seen, once, sent, left };
        }""",
        str(TokenMask._esm),
    )
    assert sent == {
        "seen": ["true", "false", "true"],
        "once": ["100"],
        "sent": ["100"],
        "left": {"handlers": [], "children": 0, "pressed": "false"},
    }


def test_the_page_follows_the_kernel_in_place(desk: Desk):
    desk.chips().nth(7).focus()
    desk.masks[0].evaluate("root => root.querySelectorAll('button').forEach(chip => { chip.sameAsBefore = true })")
    desk.ask("w.mask = [[1] * 21, [0] * 21]; w.values = [[0.5] * 21, [float('nan')] * 21]; w.notes = ()")
    desk.settle("1" * 21 + " " + "0" * 21)
    expect(desk.chips().nth(0)).to_have_accessible_name("sequence 0, token 0: a, prompt, mask 1, gradient 0.5000")
    expect(desk.chips().nth(41)).to_have_accessible_name("sequence 1, token 20: <pad>, padding, mask 0, gradient NaN")
    assert desk.focused() == 7
    kept = "root => [...root.querySelectorAll('button')].every(chip => chip.sameAsBefore)"
    assert desk.masks[0].evaluate(kept)
    desk.ask("w.values = values; w.notes = notes")


def test_a_stroke_under_other_words_can_still_be_undone_but_not_under_other_roles(desk: Desk):
    desk.chips().nth(0).click()
    desk.settle(with_ones(0))
    desk.ask("w.tokens = [['z'] * 21] * 2")
    expect(desk.chips().nth(0)).to_have_text("z")
    desk.page.keyboard.press("Control+z")
    desk.settle(START)
    desk.page.keyboard.press("Control+y")
    desk.ask("roles = w.labels; w.labels = [['response'] * 21] * 2")
    expect(desk.chips().nth(0)).to_have_attribute("data-role", "response")
    desk.page.keyboard.press("Control+z")
    desk.settle(with_ones(0))
    desk.ask("w.tokens = tokens; w.labels = roles")


def test_other_tokens_of_another_shape(desk: Desk):
    desk.chips().nth(41).focus()
    desk.ask("w.show([['a', '<eos>']], [[0, 1]])")
    desk.settle("01")
    assert desk.focused() == 1
    desk.page.keyboard.press("Control+z")  # nothing of the old tokens is left to undo
    desk.settle("01")
    desk.ask("w.show(tokens, mask, values=values, notes=notes)")
    desk.settle(START)


def test_two_views_stay_in_step(desk: Desk):
    desk.drag(0, 3, n=1)
    desk.settle(with_ones(*range(4)))
    desk.settle(with_ones(*range(4)), n=1)
    desk.chips().nth(0).click()
    desk.settle(with_ones(1, 2, 3), n=1)


def test_the_kernels_mask_wins(desk: Desk):
    desk.ask("w.observe(lambda change: setattr(w, 'mask', [change['new'][0], [0] * 21]), 'mask')")
    desk.drag(20, 41, 31)
    desk.settle("0" * 16 + "11110 " + "0" * 21)
    desk.chips().nth(30).click()
    desk.settle("0" * 16 + "11110 " + "0" * 21)


def test_a_finger_paints_sideways_and_scrolls_up_and_down(desk: Desk):
    session = desk.page.context.new_cdp_session(desk.page)
    session.send("Emulation.setTouchEmulationEnabled", {"enabled": True})

    def swipe(*points: tuple[float, float]) -> None:
        for kind, point in zip(["touchStart", *["touchMove"] * (len(points) - 1)], points, strict=True):
            session.send(
                "Input.dispatchTouchEvent", {"type": kind, "touchPoints": [{"x": point[0], "y": point[1], "id": 1}]}
            )
        session.send("Input.dispatchTouchEvent", {"type": "touchEnd", "touchPoints": []})

    try:
        swipe(desk.centre(3))
        desk.settle(with_ones(3))
        desk.page.keyboard.press("Control+z")
        swipe(*[desk.centre(index) for index in (1, 2, 3, 6)])
        desk.settle(with_ones(*range(1, 7)))
        desk.page.keyboard.press("Control+z")
        x, y = desk.centre(5)
        swipe(*[(x, y - 12 * step) for step in range(12)])
        desk.page.wait_for_timeout(300)
        desk.settle(START)
    finally:
        session.send("Emulation.setTouchEmulationEnabled", {"enabled": False})
        session.detach()


def test_hostile_text_is_shown_as_text(desk: Desk):
    root = desk.masks[3]
    elements = root.evaluate("root => [...new Set([...root.querySelectorAll('*')].map(e => e.tagName))].sort()")
    assert elements == ["BUTTON", "DIV", "SPAN"]
    faces = root.evaluate("root => [...root.querySelectorAll('button')].map(chip => chip.textContent)")
    assert faces == json.loads(desk.ask("import json; print(json.dumps(hostile.tokens[0]))"))
    assert faces[0] == f"{HOSTILE[0]}0"
    box = root.bounding_box()
    for index in (0, 9, 10, 499):
        chip = desk.chips(3).nth(index).bounding_box()
        assert box["x"] <= chip["x"] <= chip["x"] + chip["width"] <= box["x"] + box["width"]
    desk.chips(3).nth(1).click()
    desk.settle("01" + "0" * 498, "hostile", n=3)


def test_the_legend_shows_each_role_as_it_looks_in_the_grid(desk: Desk):
    desk.ask("w.mask = [[0] * 21] * 2")
    for values, shade in (("[[0.0] * 21] * 2", "value"), ("()", None)):
        desk.ask(f"w.values = {values}")
        expect(desk.masks[0].locator(f"button[data-shade={shade}]")).to_have_count(27 if shade else 0)
        looks = desk.masks[0].evaluate(ROLE_LOOKS)
        assert [sample for sample, _ in looks] == [chip for _, chip in looks]
        assert len({sample for sample, _ in looks}) == 4
    desk.ask("w.values = values")


# Of each role, how its sample in the legend looks, and how its first token.
ROLE_LOOKS = """root => {
  const look = (chip) => {
    const [box, mark] = [getComputedStyle(chip), getComputedStyle(chip, "::after")];
    return [box.backgroundColor, box.color, box.borderTop, parseFloat(box.borderTopLeftRadius) > 9, box.boxShadow,
            mark.content, mark.borderBottom].join("; ");
  };
  return ["prompt", "response", "eos", "padding"].map((role) =>
    [".sft-edu-mask-legend", ".sft-edu-mask-grid"].map((part) =>
      look(root.querySelector(`${part} [data-role=${role}]`))));
}"""


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_all_text_can_be_read(desk: Desk, theme: str):
    desk.lab.theme(theme)
    shades = [0.0, 1e-4, 1e-3, 1e-2, 0.1, 0.25, 0.5, 1.0]
    shades = [sign * size for size in shades for sign in (1, -1)] + [float("nan")] * 5
    desk.ask(f"nan = float('nan'); w.values = [{shades}, {shades}]")
    expect(desk.chips().nth(20)).to_have_attribute("data-shade", "unknown")
    shaded = text_on_background(desk.masks[0])
    desk.ask("w.values = ()")
    expect(desk.chips().nth(20)).not_to_have_attribute("data-shade", "unknown")
    plain = text_on_background(desk.masks[0])
    desk.ask("w.values = values")
    assert len(shaded) > 50
    assert [pair for pair in shaded + plain if contrast(pair[1], pair[2]) < 4.5] == []
    assert len({tuple(pair[2]) for pair in shaded}) > 15


def text_on_background(root: Locator) -> list[tuple[str, list[float], list[float]]]:
    """Each text of a widget with its colour and that of what it stands on, half-transparent ones mixed."""
    return root.evaluate(
        """root => {
          const numbers = text => { const [r, g, b, a = 1] = text.match(/[\\d.]+/g).map(Number); return [r, g, b, a]; };
          const over = (top, below) => top.slice(0, 3).map((c, i) => c * top[3] + below[i] * (1 - top[3]));
          const background = node => {
            if (!node) return [255, 255, 255];
            const own = numbers(getComputedStyle(node).backgroundColor);
            return own[3] === 1 ? own.slice(0, 3) : over(own, background(node.parentElement));
          };
          return [...root.querySelectorAll('*')]
            .filter(node => [...node.childNodes].some(child => child.nodeType === 3 && child.data.trim()))
            .map(node => {
              const below = background(node);
              return [node.textContent, over(numbers(getComputedStyle(node).color), below), below];
            });
        }"""
    )


def test_a_drag_over_a_large_grid_paints_every_chip(desk: Desk, record_property):
    desk.masks[2].scroll_into_view_if_needed()
    columns = desk.masks[2].evaluate(
        "root => Number(root.querySelector('.sft-edu-mask-grid').style.getPropertyValue('--sft-edu-columns'))"
    )
    desk.page.evaluate(
        """() => {
          window.sftFrames = [];
          let last = performance.now(), running = true;
          const frame = now => {
            window.sftFrames.push(now - last);
            last = now;
            if (running) requestAnimationFrame(frame);
          };
          requestAnimationFrame(frame);
          window.sftStop = () => { running = false; };
        }"""
    )
    below = 128 + columns
    desk.drag(0, columns - 1, columns, 2 * columns - 1, 128, below - 1, n=2, steps=60)
    frames = desk.page.evaluate("() => { window.sftStop(); return window.sftFrames.slice(1).sort((a, b) => a - b); }")
    shown = desk.shown(2)
    desk.settle(shown, "big", n=2)
    flat = shown.replace(" ", "")
    for first in (0, columns, 128):
        assert flat[first : first + columns] == "1" * columns
    median, late = frames[len(frames) // 2], frames[int(0.95 * len(frames))]
    record_property("frame_ms", f"median {median:.1f}, 95th percentile {late:.1f}, longest {frames[-1]:.1f}")
    print(f"{len(frames)} frames: median {median:.1f} ms, 95th percentile {late:.1f}, longest {frames[-1]:.1f}")
