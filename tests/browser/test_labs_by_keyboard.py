"""Every lab from its first control to its last with nothing but keys, and out again."""

import io
from collections.abc import Iterator
from itertools import pairwise

import pytest
from PIL import Image, ImageChops
from playwright.sync_api import expect

from .lab_page import SECONDS, LabPage
from .labs_notebook import Labs, labs_notebook, until

FOOTER = ["textbox state", "button save PNG", "button save SVG"]
# Role and beginning of the name of each stop of Tab, in order.
STOPS = {
    "mask": [
        "combobox mask",
        "button reset",
        "button sequence 0, token 0:",
        "button 1 num_tokens",
        "region more about the selected step",
        *FOOTER,
    ],
    "step": [
        "slider G",
        "textbox G",
        "spinbutton c",
        "combobox rule",
        "slider log p",
        "textbox log p",
        "button reset",
        "button sequence 0, token 0:",
        "button 1 num_tokens",
        "region more about the selected step",
        *FOOTER,
    ],
    "accumulation": [
        "slider sequences",
        "textbox sequences",
        "slider G",
        "textbox G",
        "combobox rule",
        "slider imbalance",
        "textbox imbalance",
        "slider played",
        "textbox played",
        "button play or pause",
        "button stop, back to 0",
        "button repeat",
        "button reset",
        *FOOTER,
    ],
    "optimizer": [
        "combobox bug",
        "slider G",
        "textbox G",
        "slider steps",
        "textbox steps",
        "slider eps",
        "textbox eps",
        "slider max_norm",
        "textbox max_norm",
        "slider lr",
        "textbox lr",
        "button reset",
        *FOOTER,
    ],
    "ranks": [
        "slider W",
        "textbox W",
        "slider sequences",
        "textbox sequences",
        "slider skew",
        "textbox skew",
        "combobox D",
        "button reset",
        *FOOTER,
    ],
    "scaling": [
        "slider G",
        "textbox G",
        "slider imbalance",
        "textbox imbalance",
        "spinbutton max_norm",
        "button reset",
        *FOOTER,
    ],
}
# What is pressed at a stop, and what the kernel has then. A text is typed over what is there.
KEYS = {
    "mask": [
        ("combobox mask", ["ArrowDown"], "mask.preset", "prompt leaked in"),
        ("button sequence 0, token 0:", ["End", "Space"], "mask.mask", ((1, 1, 1, 1, 1, 0),)),
        ("button 1 num_tokens", ["ArrowRight", "Enter"], "mask._chain.selected", "masked_sum"),
        ("textbox state", ["type mask=101010", "Enter"], "mask.mask", ((1, 0, 1, 0, 1, 0),)),
        ("button reset", ["Enter"], "mask.preset", "correct"),
    ],
    "step": [
        ("slider G", ["ArrowRight"], "step.gradient_accumulation_steps", 3),
        ("textbox G", ["type 5", "Enter"], "step.gradient_accumulation_steps", 5),
        ("textbox G", ["type 6", "Tab"], "step.gradient_accumulation_steps", 6),
        ("spinbutton c", ["type 2", "Enter"], "step.normalize_constant", 2.0),
        ("combobox rule", ["ArrowDown"], "step.rule", "microbatch_mean"),
        ("slider log p", ["ArrowLeft"], "round(step.focused_log_prob, 4)", -0.6),
        ("textbox log p", ["type -2", "Enter"], "step.focused_log_prob", -2.0),
        ("button sequence 0, token 0:", ["ArrowRight", "Space"], "step.mask", ((1, 0, 0, 1), (1, 1, 1, 1))),
        ("button 1 num_tokens", ["End", "Enter"], "step._chain.selected", "returned_loss"),
        ("textbox state", ["type G=8 mask=1000/0000", "Enter"], "step.num_tokens", 1),
        ("button reset", ["Space"], "step.num_tokens", 7),
    ],
    "accumulation": [
        ("slider sequences", ["ArrowRight"], "accumulation.num_sequences", 9),
        ("textbox sequences", ["type 8", "Tab"], "accumulation.num_sequences", 8),
        ("slider G", ["ArrowLeft"], "accumulation.gradient_accumulation_steps", 3),
        ("textbox G", ["type 2", "Enter"], "accumulation.gradient_accumulation_steps", 2),
        ("combobox rule", ["ArrowUp"], "accumulation.rule", "microbatch_token_mean"),
        ("slider imbalance", ["End"], "accumulation.imbalance", 1.0),
        ("textbox imbalance", ["type 0.8", "Enter"], "accumulation.imbalance", 0.8),
        ("slider played", ["ArrowRight"], "accumulation.played", 1),
        ("textbox played", ["type 0", "Enter"], "accumulation.played", 0),
        ("button play or pause", ["Enter"], "accumulation.played", 2),
        ("button stop, back to 0", ["Space"], "accumulation.played", 0),
        ("button repeat", ["Enter"], "accumulation._controls['played_by_play'].repeat", True),
        ("textbox state", ["type sequences=8 G=4 played=4", "Enter"], "accumulation.played", 4),
        ("textbox G", ["type 6", "Enter"], "accumulation.gradient_accumulation_steps", 6),
        ("slider played", ["End"], "accumulation.played", 6),
        ("button reset", ["Enter"], "accumulation.played", 0),
    ],
    "optimizer": [
        ("combobox bug", ["ArrowDown"], "optimizer.bug", "no_G"),
        ("slider G", ["ArrowLeft"], "optimizer.gradient_accumulation_steps", 7),
        ("textbox G", ["type 3", "Tab"], "optimizer.gradient_accumulation_steps", 3),
        ("slider steps", ["End"], "optimizer.optimizer_steps", 50),
        ("textbox steps", ["type 9", "Enter"], "optimizer.optimizer_steps", 9),
        ("slider eps", ["ArrowRight"], "optimizer.eps", 1e-7),
        ("textbox eps", ["type 1e-4", "Enter"], "optimizer.eps", 1e-4),
        ("slider max_norm", ["End"], "optimizer.max_norm", 10.0),
        ("textbox max_norm", ["type 1", "Tab"], "optimizer.max_norm", 1.0),
        ("slider lr", ["Home"], "optimizer.learning_rate", 1e-3),
        ("textbox lr", ["type 0.1", "Enter"], "optimizer.learning_rate", 0.1),
        ("textbox state", ["type bug=no_N steps=2", "Enter"], "optimizer.bug", "no_N"),
        ("button reset", ["Space"], "optimizer.bug", "G_twice"),
    ],
    "ranks": [
        ("slider W", ["ArrowRight"], "ranks.world_size", 3),
        ("textbox W", ["type 64", "Enter"], "ranks.world_size", 64),
        ("slider sequences", ["Home"], "ranks.num_sequences", 8),
        ("textbox sequences", ["type 16", "Tab"], "ranks.num_sequences", 16),
        ("slider skew", ["Home"], "ranks.skew", 0.0),
        ("textbox skew", ["type 0.5", "Enter"], "ranks.skew", 0.5),
        ("combobox D", ["ArrowDown"], "ranks.denominator", "local_times_world"),
        ("textbox state", ["type W=5 denominator=global", "Enter"], "ranks.world_size", 5),
        ("button reset", ["Space"], "ranks.world_size", 2),
    ],
    "scaling": [
        ("slider G", ["ArrowLeft"], "scaling.gradient_accumulation_steps", 3),
        ("textbox G", ["type 5", "Tab"], "scaling.gradient_accumulation_steps", 5),
        ("slider imbalance", ["Home"], "scaling.imbalance", 0.0),
        ("textbox imbalance", ["type 0.7", "Enter"], "scaling.imbalance", 0.7),
        ("spinbutton max_norm", ["type 20", "Enter"], "scaling.max_norm", 20.0),
        ("textbox state", ["type G=2 imbalance=1", "Enter"], "scaling.imbalance", 1.0),
        ("button reset", ["Space"], "scaling.imbalance", 0.5),
    ],
}
FIRST = "button, input, select, [role=slider]"


class Keyboard:
    """Keys, and what the accessibility tree says of the element that they reach."""

    def __init__(self, labs: Labs):
        self.labs, self.page = labs, labs.page
        self.session = labs.page.context.new_cdp_session(labs.page)

    def enter(self, name: str) -> None:
        self.labs.output(name).scroll_into_view_if_needed()
        self.labs.output(name).locator(FIRST).first.focus()

    def stop(self) -> str:
        """Role and name of what has the focus, as Chromium tells them to a screen reader."""
        active = self.session.send("Runtime.evaluate", {"expression": "document.activeElement"})["result"]
        request = {"objectId": active["objectId"], "fetchRelatives": False}
        node = self.session.send("Accessibility.getPartialAXTree", request)["nodes"][0]
        role = {"PopUpButton": "combobox"}.get(node["role"]["value"], node["role"]["value"])
        return f"{role} {node['name']['value']}".lower() if "name" in node else role.lower()

    def go(self, name: str, stop: str) -> None:
        self.enter(name)
        for _ in STOPS[name]:
            if self.stop().startswith(stop.lower()):
                return
            self.page.keyboard.press("Tab")
        raise AssertionError(f"Tab does not reach {stop}")

    def press(self, keys: list[str]) -> None:
        for key in keys:
            if key.startswith("type "):
                self.page.keyboard.press("Control+a")
                self.page.keyboard.type(key.removeprefix("type "))
            else:
                self.page.keyboard.press(key)

    def is_inside(self, name: str) -> bool:
        return self.labs.output(name).evaluate("output => output.contains(document.activeElement)")

    def box(self) -> dict[str, float]:
        return self.page.evaluate("() => document.activeElement.getBoundingClientRect().toJSON()")


@pytest.fixture(scope="module")
def labs(lab: LabPage) -> Iterator[Labs]:
    with labs_notebook(lab) as open_labs:
        yield open_labs


@pytest.fixture
def keyboard(labs: Labs) -> Iterator[Keyboard]:
    hands = Keyboard(labs)
    yield hands
    hands.session.detach()


@pytest.mark.parametrize("name", STOPS)
def test_tab_visits_every_control_as_they_stand_and_leaves(labs: Labs, keyboard: Keyboard, name: str):
    keyboard.enter(name)
    visited, boxes = [], []
    while keyboard.is_inside(name) and len(visited) < 40:
        visited.append(keyboard.stop())
        boxes.append(keyboard.box())
        labs.page.keyboard.press("Tab")
    assert [stop[: len(wanted)] for stop, wanted in zip(visited, STOPS[name], strict=True)] == [
        wanted.lower() for wanted in STOPS[name]
    ]
    for before, after in pairwise(boxes):
        assert after["top"] >= before["bottom"] - 12 or after["left"] > before["left"], (before, after)
    keyboard.go(name, STOPS[name][-1])
    labs.page.keyboard.press("Shift+Tab")
    assert keyboard.stop() == visited[-2]
    keyboard.enter(name)
    labs.page.keyboard.press("Shift+Tab")
    assert not keyboard.is_inside(name)


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("name", STOPS)
def test_the_focus_can_be_seen(labs: Labs, keyboard: Keyboard, name: str, theme: str):
    labs.lab.theme(theme)
    keyboard.enter(name)
    unseen = []
    for _ in STOPS[name]:
        stop, box = keyboard.stop(), keyboard.box()
        clip = {"x": box["x"] - 5, "y": box["y"] - 5, "width": box["width"] + 10, "height": box["height"] + 10}
        labs.page.evaluate("() => document.activeElement.scrollIntoView({ block: 'nearest' })")
        focused = picture(labs, clip)
        labs.page.keyboard.press("Tab")
        away = picture(labs, clip)
        changed = ImageChops.difference(focused, away).convert("L").point(lambda change: 255 * (change > 40))
        unseen += [(stop, changed.histogram()[255])] if changed.histogram()[255] < box["width"] else []
    labs.lab.theme("light")
    assert unseen == []


def picture(labs: Labs, clip: dict[str, float]) -> Image.Image:
    png = labs.page.screenshot(clip=clip, caret="hide", animations="disabled")
    return Image.open(io.BytesIO(png)).convert("RGB")


@pytest.mark.parametrize("name", KEYS)
def test_keys_change_every_setting_and_the_page_follows(labs: Labs, keyboard: Keyboard, name: str):
    start = labs.ask(f"{name}.state")
    for stop, keys, wanted, value in KEYS[name]:
        keyboard.go(name, stop)
        keyboard.press(keys)
        labs.settle(wanted, value)
        labs.agree(name, asked=stop == "button 1 num_tokens")
    assert labs.ask(f"{name}.state") == start


@pytest.mark.parametrize("name", STOPS)
def test_a_picture_is_saved_by_keys(labs: Labs, keyboard: Keyboard, name: str):
    keyboard.go(name, "button save svg")
    with labs.page.expect_download(timeout=20 * SECONDS) as download:
        labs.page.keyboard.press("Enter")
    kind = labs.ask(f"type({name}).__name__")
    assert download.value.suggested_filename == f"{kind}.svg"
    assert labs.ask(f"{name}.state") in download.value.path().read_text(encoding="utf-8")
    expect(labs.output(name).locator(".sft-edu-save-status")).to_have_text(f"saved {kind}.svg")


def test_a_number_out_of_range_is_answered_with_the_range(labs: Labs, keyboard: Keyboard):
    for name, stop, typed, answer in [
        ("step", "textbox G", "700", "G: got 700; expected 1 to 32"),
        ("accumulation", "textbox G", "9", "G: got 9; expected 1 to 8"),
        ("accumulation", "textbox imbalance", "", "imbalance: got nothing; expected 0 to 1"),
        ("optimizer", "textbox eps", "5", "eps: got 5; expected 1e-12 to 0.01"),
        ("optimizer", "textbox max_norm", "0.001", "max_norm: got 0.001; expected 0.01 to 10"),
        ("ranks", "textbox W", "65", "W: got 65; expected 1 to 64"),
        ("scaling", "textbox G", "many", "G: got many; expected 1 to 8"),
        ("scaling", "spinbutton max_norm", "500", "max_norm: got 500.0; expected 0.01 to 100"),
    ]:
        keyboard.go(name, stop)
        labs.page.keyboard.press("Control+a")
        labs.page.keyboard.press("Delete")
        labs.page.keyboard.type(typed)
        labs.page.keyboard.press("Enter")
        expect(labs.output(name).get_by_role("alert")).to_have_text(answer)
        until(lambda name=name: keyboard_text(labs) in labs.ask(f"{name}.state"), lambda: keyboard_text(labs))
        labs.agree(name)
        keyboard.go(name, "button reset")
        labs.page.keyboard.press("Enter")
        expect(labs.output(name).get_by_role("alert")).to_have_count(0)


def keyboard_text(labs: Labs) -> str:
    """What stands in the field that has the focus, as the state text writes it."""
    text = labs.page.evaluate("() => document.activeElement.value ?? document.activeElement.textContent")
    return f"={float(text):g}"
