// Steps as boxes from left to right. Boxes are made once for a number of stages; after that only texts change.
// view.js, step_ahead.js and inputs_ahead.js stand above this line when it runs.

const PARTS = ["name", "symbolic", "numeric", "value"];
const LATE = 150; // milliseconds of waiting for the kernel, after which the page looks like it
const HINT = "Press a step to see more of it.";
const AHEAD = "worked out by the page; the kernel has yet to answer";

function render({ model, el }) {
  const root = make("div", "sft-edu-view sft-edu-chain");
  root.dir = "ltr"; // steps run from left to right, whatever their letters
  const row = make("div", "sft-edu-chain-row", "toolbar");
  const area = make("div", "sft-edu-chain-detail", "region");
  const head = make("div", "sft-edu-chain-head");
  const body = make("div", "sft-edu-chain-lines");
  const words = new Words(model.get("words"));
  row.setAttribute("aria-label", "steps");
  area.setAttribute("aria-label", "more about the selected step");
  area.tabIndex = 0; // to scroll it by keys
  area.dataset.lmSuppressShortcuts = "true";
  area.append(head, body);
  root.append(row, area, words.shown, words.heard);
  el.append(root);

  let boxes = [];
  let names = [];
  let lines = [];
  let current = 0; // the box that holds the tab stop
  let asking = false; // this view has selected a stage and is to read out the answer
  let inputs = null; // of the numbers; null where none can be drawn ahead of the kernel
  let unfollow = () => {};
  let waiting = 0;

  function makeBox(index) {
    const cell = make("div", "sft-edu-chain-cell");
    const button = make("button", "sft-edu-chain-box");
    button.type = "button";
    button.tabIndex = -1;
    button.dataset.index = index;
    button.dataset.lmSuppressShortcuts = "true"; // or x, pressed on a box, cuts the cell
    const box = { cell, button };
    for (const part of PARTS) box[part] = make("span", `sft-edu-chain-${part}`);
    const formula = make("span", "sft-edu-chain-formula");
    formula.append(box.symbolic, box.numeric);
    button.append(box.name, formula, box.value);
    cell.append(button);
    return box;
  }

  function follow() {
    unfollow();
    const ahead = model.widget_manager && model.get("ahead"); // some hosts have no other models to show
    inputs = ahead ? new Inputs(model.get("inputs")) : null;
    unfollow = ahead ? followControls(model.widget_manager, ahead.controls, inputs, drawStages) : () => {};
    drawStages();
  }

  // The kernel's stages or, while it has yet to answer what the controls show, the same with the page's own texts; and
  // whether these are the page's.
  function stagesNow() {
    const stages = model.get("stages");
    inputs?.answer(model.get("inputs"));
    const isAhead = Boolean(inputs) && !inputs.areAnswered;
    const texts = isAhead && stagesAhead({ ...inputs.now, rule: model.get("ahead").rules[inputs.now.rule] });
    return [texts ? stages.map((stage) => ({ ...stage, ...texts[stage.name] })) : stages, Boolean(texts)];
  }

  function drawStages() {
    const [stages, areAhead] = stagesNow();
    names = stages.map((stage) => stage.name);
    if (stages.length !== boxes.length) {
      const hadFocus = row.contains(document.activeElement);
      boxes = stages.map((_, index) => makeBox(index));
      row.style.setProperty("--sft-edu-chain-count", String(Math.max(1, boxes.length)));
      row.replaceChildren(...boxes.map((box) => box.cell));
      if (boxes.length) touch(Math.min(current, boxes.length - 1), hadFocus);
      drawSelected();
    }
    stages.forEach((stage, index) => {
      const box = boxes[index];
      write(box.name, `${stage.step} ${stage.name}`.trim());
      write(box.symbolic, stage.symbolic);
      write(box.numeric, stage.numeric && stage.symbolic ? `= ${stage.numeric}` : stage.numeric);
      write(box.value, stage.value);
      box.value.classList.toggle("sft-edu-chain-long", stage.value.length > 12);
      for (const part of PARTS) {
        const title = box[part].textContent + (areAhead && part === "value" ? `: ${AHEAD}` : "");
        if (box[part].title !== title) box[part].title = title; // in case it is cut
      }
    });
    drawAhead(areAhead);
    drawHead();
  }

  // The numbers are marked at once; the rest only if it takes long, or it would flicker at every key.
  function drawAhead(areAhead) {
    root.dataset.ahead = String(areAhead);
    if (areAhead) {
      waiting ||= setTimeout(() => (root.dataset.late = "true"), LATE);
    } else {
      clearTimeout(waiting);
      waiting = 0;
      root.dataset.late = "false";
    }
  }

  function drawSelected() {
    const selected = model.get("selected");
    boxes.forEach((box, index) => {
      box.button.setAttribute("aria-pressed", String(names[index] === selected));
    });
    drawHead();
    drawDetail();
  }

  function drawHead() {
    const index = names.indexOf(model.get("selected"));
    write(head, index < 0 ? HINT : boxes[index].name.textContent);
    area.dataset.selected = String(index >= 0);
  }

  function drawDetail() {
    // Until the kernel has heard of a selection, its detail is that of another stage.
    const selected = model.get("selected");
    const answered = selected === "" || (names.includes(selected) && model.get("_answered") === selected);
    const shown = answered ? model.get("detail") : [];
    if (shown.length !== lines.length) {
      lines = shown.map(() => make("div", "sft-edu-chain-line"));
      body.replaceChildren(...lines);
    }
    shown.forEach((text, index) => write(lines[index], text));
  }

  function drawAnswer() {
    drawDetail();
    if (asking && lines.length) words.announce([head, ...lines].map((line) => line.textContent).join(". "), 100);
    asking = false;
  }

  function touch(index, focus = true) {
    if (boxes[current]) boxes[current].button.tabIndex = -1;
    current = index;
    boxes[current].button.tabIndex = 0;
    if (focus) boxes[current].button.focus();
  }

  function onClick(event) {
    const button = event.target.closest(".sft-edu-chain-box");
    if (!button) return;
    const index = Number(button.dataset.index);
    touch(index);
    asking = model.get("selected") !== names[index];
    model.set("selected", asking ? names[index] : "");
    model.save_changes();
  }

  function onKeydown(event) {
    if (event.ctrlKey || event.metaKey || event.altKey || event.shiftKey) return;
    const last = boxes.length - 1;
    const goal = {
      ArrowRight: Math.min(current + 1, last),
      ArrowDown: Math.min(current + 1, last),
      ArrowLeft: Math.max(current - 1, 0),
      ArrowUp: Math.max(current - 1, 0),
      Home: 0,
      End: last,
    }[event.key];
    if (goal === undefined) return;
    event.preventDefault(); // the page does not scroll
    event.stopPropagation();
    touch(goal);
  }

  function onFocus(event) {
    const button = event.target.closest(".sft-edu-chain-box");
    if (button) touch(Number(button.dataset.index), false);
  }

  function drawCount() {
    root.dataset.drawn = String(model.get("drawn"));
  }

  const unlisten = listen(model, {
    "change:stages": drawStages,
    "change:inputs": drawStages,
    "change:ahead": follow,
    "change:selected": drawSelected,
    "change:detail": drawDetail,
    "change:_answered": drawAnswer,
    "change:words": () => words.show(model.get("words")),
    change: drawCount, // comes after the others, when all of a message is drawn
  });
  row.addEventListener("click", onClick);
  row.addEventListener("keydown", onKeydown);
  row.addEventListener("focusin", onFocus);

  follow();
  drawSelected();
  drawCount();
  return () => {
    words.stop();
    clearTimeout(waiting);
    unfollow();
    unlisten();
    root.remove();
  };
}

export default { render };
