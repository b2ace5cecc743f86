"""StepLab between a hand and the kernel's answer: the page's own numbers, marked, and never behind the hand."""

import ast
from collections.abc import Iterator

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook
from playwright.sync_api import Locator, expect
from run_notebooks import METADATA

from sft_edu.widgets import StageChain

from .lab_page import LabPage

CELL = """
import torch
from sft_edu.widgets import StepLab
lab = StepLab(torch.tensor([[-0.5, -0.1235, -0.8, -0.2], [-0.4, -0.6, -0.3, -12.0]]))
lab"""
# Holds back what the kernel sends, so that a test can look at the page before the answer.
HOLD = """
window.WebSocket = class extends WebSocket {
  set onmessage(listener) {
    super.onmessage = event => window.held ? window.held.push(() => listener.call(this, event)) : listener(event);
  }
};
window.hold = () => { window.held = []; };
window.release = () => { const held = window.held; window.held = null; held.forEach(send => send()); };
"""
# Where each number stands: the text itself, not its box.
PLACES = """chain => [...chain.querySelectorAll('.sft-edu-chain-value')].map(value => {
  const range = document.createRange();
  range.selectNodeContents(value);
  const { left, top, width, height } = range.getBoundingClientRect();
  return [left, top, width, height];
})"""
COLOUR = "node => getComputedStyle(node).color"
# Every state of the numbers that a frame could have shown, beginning with the present one.
RECORD = """chain => {
  const values = [...chain.querySelectorAll('.sft-edu-chain-value')];
  const state = () => [chain.dataset.ahead, ...values.map(value => value.textContent)];
  const seen = [state()];
  new MutationObserver(() => seen.push(state())).observe(chain, {
    subtree: true, childList: true, characterData: true, attributeFilter: ['data-ahead']
  });
  return seen;
}"""


class Desk:
    """One StepLab on a page of its own."""

    def __init__(self, lab: LabPage):
        self.lab, self.page = lab, lab.page
        self.chain = self.page.locator(".sft-edu-chain")
        self.values = self.chain.locator(".sft-edu-chain-value")
        self.slider, self.log_prob = (self.page.locator(".noUi-handle").nth(index) for index in (0, 1))

    def chip(self, index: int) -> Locator:
        return self.page.locator(f".sft-edu-chip[data-index='{index}']")

    def kernel(self, wanted: str, code: str = "") -> object:
        script = """async ([wanted, code]) => {
          const kernel = window.jupyterapp.shell.currentWidget.sessionContext.session.kernel;
          const request = { code, user_expressions: { wanted }, store_history: false };
          return (await kernel.requestExecute(request).done).content.user_expressions.wanted.data['text/plain'];
        }"""
        return ast.literal_eval(self.page.evaluate(script, [wanted, code]))

    def press(self, handle: Locator, key: str, times: int = 1, pause: float = 0) -> None:
        handle.focus()
        for _ in range(times):
            self.page.keyboard.press(key)
            self.page.wait_for_timeout(pause)

    def record(self):
        return self.chain.evaluate_handle(RECORD)

    def settle(self) -> None:
        """Wait until the numbers are the kernel's, for what the kernel has been told last."""
        for _ in range(50):
            self.page.wait_for_timeout(100)
            theirs = self.kernel("[stage['value'] for stage in lab._chain.stages], str(lab._drawn)")
            ours = (self.values.all_inner_texts(), self.chain.get_attribute("data-drawn"))
            if theirs == ours and self.chain.get_attribute("data-ahead") == "false":
                return
        raise AssertionError(f"the page shows {ours}, the kernel has {theirs}")


@pytest.fixture(scope="module")
def opened(lab: LabPage) -> Iterator[Desk]:
    context = lab.page.context.browser.new_context(viewport=lab.page.viewport_size)
    page = context.new_page()
    page.add_init_script(HOLD)
    own = LabPage(page, lab.server)
    notebook = new_notebook(cells=[new_code_cell(CELL.strip())], metadata=METADATA)
    nbformat.write(notebook, lab.server.folder / "step_ahead.ipynb")
    own.open("step_ahead.ipynb")
    yield Desk(own)
    own.close()
    context.close()


@pytest.fixture
def desk(opened: Desk) -> Iterator[Desk]:
    opened.lab.run_all()
    opened.settle()
    yield opened
    opened.page.evaluate("window.held && release()")
    assert opened.lab.errors() == []
    assert opened.lab.console_errors == []


def test_numbers_are_there_before_the_kernel_and_are_marked_until_it_answers(desk: Desk):
    words = desk.chain.locator(".sft-edu-words")
    before = words.inner_text()
    desk.page.evaluate("hold()")
    desk.press(desk.slider, "ArrowRight")
    expect(desk.chain).to_have_attribute("data-ahead", "true", timeout=100)
    expect(desk.values).to_have_text(["7", "-14.1235", "4.7078", "1.5693", "-0.1111 or 0", "1.5693"], timeout=100)
    expect(desk.chain.locator(".sft-edu-chain-numeric").nth(2)).to_have_text("= -(-14.1235) / 3")
    expect(desk.chain.get_by_role("button").nth(2)).to_have_accessible_name("3 loss -S / G = -(-14.1235) / 3 ≈ 4.7078")
    desk.page.wait_for_timeout(500)
    assert desk.chain.get_attribute("data-ahead") == "true"
    assert words.inner_text() == before
    faint = words.evaluate(COLOUR)
    places = desk.chain.evaluate(PLACES)
    seen = desk.record()
    desk.page.evaluate("release()")
    desk.settle()
    assert {tuple(values) for _, *values in seen.json_value()} == {tuple(desk.values.all_inner_texts())}
    assert "loss 4.7078, scaled_loss 1.5693" in desk.kernel("repr(lab).replace('\\n', ' ')")
    assert words.inner_text() != before
    assert words.evaluate(COLOUR) != faint
    assert desk.chain.evaluate(PLACES) == places


def test_every_control_counts_and_no_answer_on_the_way_shows_through(desk: Desk):
    """Each control has messages of its own, so the kernel answers settings that were never shown together."""
    desk.page.evaluate("hold()")
    desk.press(desk.slider, "ArrowRight", 3)
    desk.press(desk.log_prob, "ArrowLeft", 5)
    desk.page.get_by_label("rule").select_option("token_mean")
    constant = desk.page.locator("input[type=number]")
    constant.fill("2.5")
    constant.press("Enter")
    desk.press(desk.slider, "ArrowRight", 2)
    expected = ["7", "-5.8494", "0.2984", "0.2984", "-0.0204 or 0", "0.2984"]
    expect(desk.values).to_have_text(expected, timeout=100)
    expect(desk.chain.locator(".sft-edu-chain-symbolic").nth(2)).to_have_text("-c·S / N")
    seen = desk.record()
    desk.page.evaluate("release()")
    desk.settle()
    assert {tuple(values) for _, *values in seen.json_value()} == {tuple(expected)}
    assert desk.kernel("lab.state") == (
        "G=7 c=2.5 rule=token_mean mask=1101/1111 logp=-1,-0.1235,-0.8,-0.2/-0.4,-0.6,-0.3,-12"
    )


def test_a_burst_of_keys_never_shows_an_older_number_after_a_newer_one(desk: Desk):
    seen = desk.record()
    desk.press(desk.slider, "ArrowRight", 30, pause=15)
    desk.settle()
    loss = {f"{14.1235 / steps:.4f}": steps for steps in range(2, 33)}
    shown = [loss[values[2]] for _, *values in seen.json_value()]
    assert shown == sorted(shown)
    assert set(shown) == set(range(2, 33))


def test_painting_shows_its_numbers_along_with_the_chip(desk: Desk):
    desk.page.evaluate("hold()")
    desk.chip(7).click()
    expect(desk.chip(7)).to_have_attribute("aria-pressed", "false", timeout=100)
    expect(desk.values.nth(1)).to_have_text("-2.1235", timeout=100)
    desk.press(desk.chip(7), "Space")  # back: nothing is left to ask
    expect(desk.values.nth(1)).to_have_text("-14.1235", timeout=100)
    desk.page.evaluate("release()")
    desk.settle()


def test_what_code_changes_is_drawn_once_and_unmarked(desk: Desk):
    seen = desk.record()
    desk.kernel("None", "lab.state = 'G=8 c=2 rule=sequence_mean mask=1000/0000'")
    desk.settle()
    desk.kernel("None", "for steps in range(9, 20): lab.gradient_accumulation_steps = steps")
    desk.settle()
    desk.page.get_by_role("button", name="reset").click()
    desk.settle()
    states = seen.json_value()
    assert {ahead for ahead, *_ in states} == {"false"}
    assert [values[1] for _, *values in states][:2] == ["-14.1235", "-0.2500"]
    assert states[-1] == states[0]


def test_a_kernel_that_corrects_the_hand_has_the_last_word(desk: Desk):
    code = """
def at_most_4(change):
    lab.gradient_accumulation_steps = min(change["new"], 4)
lab.observe(at_most_4, "gradient_accumulation_steps")"""
    desk.kernel("None", code)
    desk.press(desk.slider, "ArrowRight", 6)
    desk.settle()
    expect(desk.slider).to_have_attribute("aria-valuenow", "4.0")
    expect(desk.chain.locator(".sft-edu-chain-numeric").nth(2)).to_have_text("= -(-14.1235) / 4")


def test_the_log_prob_slider_keeps_up_and_moves_nothing_by_itself(desk: Desk):
    state = desk.kernel("lab.state")
    seen = desk.record()
    for index in range(8):
        desk.chip(index).focus()
        desk.page.wait_for_timeout(150)
    desk.settle()
    assert desk.kernel("lab.state") == state
    assert len({tuple(shown) for shown in seen.json_value()}) == 1
    desk.chip(4).focus()
    desk.page.wait_for_timeout(500)
    desk.press(desk.log_prob, "ArrowLeft", 25, pause=15)
    desk.settle()
    assert desk.kernel("round(lab.focused_log_prob, 4)") == -2.9
    sums = [float(values[1]) for _, *values in seen.json_value()]
    assert sums == sorted(sums, reverse=True)


def test_an_answer_that_changes_no_number_is_an_answer_too(desk: Desk):
    desk.chip(2).focus()  # the one outside of the mask
    desk.page.wait_for_timeout(500)
    numbers = desk.values.all_inner_texts()
    desk.page.evaluate("hold()")
    desk.press(desk.log_prob, "ArrowLeft")
    expect(desk.chain).to_have_attribute("data-ahead", "true", timeout=100)
    desk.page.evaluate("release()")
    desk.settle()
    assert desk.values.all_inner_texts() == numbers


def test_a_view_that_is_gone_listens_to_no_control(desk: Desk):
    answer = desk.page.evaluate(
        """async module => {
          const url = URL.createObjectURL(new Blob([module], { type: 'text/javascript' }));
          const { render } = (await import(url)).default;
          let listeners = 0;
          const fake = state => ({ get: name => state[name], on: () => { listeners++; }, off: () => { listeners--; } });
          const steps = fake({ value: 3 });
          const inputs = { steps: 2, constant: 1, rule: 'notes', mask: [[1]], log_probs: [[-1]] };
          const rules = { notes: { first: 'G', second: 'G', uses_constant: true, formula: 'c·G²' } };
          const model = fake({
            stages: [{ step: '3', name: 'loss', symbolic: '', numeric: '', value: '0.5000' }],
            ahead: { controls: { steps: 'IPY_MODEL_steps' }, rules }, inputs,
            selected: '', detail: [], words: '', _answered: '', drawn: 1,
          });
          model.widget_manager = { get_model: async () => steps };
          const el = document.createElement('div');
          const cleanup = render({ model, el });
          const own = listeners;
          await new Promise(done => setTimeout(done));
          const [others, value] = [listeners - own, el.querySelector('.sft-edu-chain-value').textContent];
          cleanup();
          return { others, value, left: listeners };
        }""",
        str(StageChain._esm),
    )
    assert answer == {"others": 1, "value": "0.3333", "left": 0}
