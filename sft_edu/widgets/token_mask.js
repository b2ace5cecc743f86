// The page's side of TokenMask: chips, pointer, keys. view.js and token_grid.js stand above this line when it runs.

const ROLES = ["prompt", "response", "eos", "padding"];
const HINT = "Press or drag to paint. Shift: from the last token to here. Ctrl+Z: undo.";
const NARROW = 560; // pixels; the words about a token need two lines there
const SWIPE = 8; // pixels a finger moves sideways before it paints

function makeText(tag, className, text) {
  const node = make(tag, className);
  node.textContent = text;
  return node;
}

function render({ model, el }) {
  const root = make("div", "sft-edu-view sft-edu-mask");
  root.dir = "ltr"; // a sequence runs from left to right, whatever its letters
  const ruler = make("div", "sft-edu-mask-ruler");
  const scroller = make("div", "sft-edu-mask-scroller");
  const grid = make("div", "sft-edu-mask-grid", "group");
  const readout = make("div", "sft-edu-mask-readout");
  const count = make("span", "sft-edu-mask-count");
  const legend = make("div", "sft-edu-mask-legend");
  const live = make("div", "sft-edu-live", "status");
  grid.setAttribute("aria-label", "response mask");
  readout.setAttribute("aria-hidden", "true"); // it repeats the label of the chip
  scroller.append(ruler, grid);
  root.append(scroller, readout, legend, live);
  el.append(root);

  let rows, length; // the shape that is drawn
  let chips, tokens, roles, values, notes; // by index
  let labels, shades; // what each chip says and shows now
  let gutters;
  let explained; // by the legend
  let layout, painter;
  let current = 0; // the chip touched last; it holds the tab stop
  let touched = false; // by anybody, yet
  let hovered = -1;
  let byKeys = false; // the last thing that happened here; a pointer at rest has nothing to say then
  let drag = null; // a stroke of the pointer
  let reach = null; // a stroke of Shift and the arrow keys
  let strokeState = 0;
  let frame = 0;
  let pressed = false; // a pointer has done what the click after it would ask for

  // --- drawing ---

  function build() {
    const given = model.get("tokens");
    const hadFocus = chips?.includes(document.activeElement);
    [rows, length] = [given.length, given[0].length];
    painter = new Painter(maskFromText(model.get("mask")));
    [drag, reach, hovered, gutters, labels, shades] = [null, null, -1, [], [], []];
    chips = [];
    const lines = given.map((_, row) => {
      const line = make("div", "sft-edu-mask-row", "group");
      const gutter = make("div", "sft-edu-mask-gutter");
      const box = make("div", "sft-edu-mask-chips");
      line.setAttribute("aria-label", `sequence ${row}`);
      gutter.setAttribute("aria-hidden", "true");
      gutters.push(gutter);
      for (let position = 0; position < length; position++) {
        const chip = make("button", "sft-edu-chip");
        chip.type = "button";
        chip.tabIndex = -1;
        chip.dataset.index = chips.length;
        chip.dataset.lmSuppressShortcuts = "true"; // or x, pressed on a chip, cuts the cell
        chip.append(make("span", "sft-edu-chip-face"));
        chips.push(chip);
        box.append(chip);
      }
      line.append(gutter, box);
      return line;
    });
    grid.replaceChildren(...lines);
    current = Math.min(current, chips.length - 1);
    chips[current].tabIndex = 0;
    readAll();
    drawFaces();
    drawLegend();
    drawStates(chips.keys());
    drawShades();
    place();
    if (hadFocus) chips[current].focus();
  }

  function readAll() {
    tokens = model.get("tokens").flat();
    roles = model.get("labels").flat();
    values = model.get("values").flat().map(Number); // "NaN" and "Infinity" are no numbers in JSON
    notes = model.get("notes").flat();
  }

  function drawFaces() {
    chips.forEach((chip, index) => {
      const text = face(tokens[index], roles[index]);
      if (chip.firstChild.textContent !== text) chip.firstChild.textContent = text;
      if (chip.dataset.role !== roles[index]) chip.dataset.role = roles[index];
    });
  }

  function drawStates(indices) {
    for (const index of indices) {
      chips[index].setAttribute("aria-pressed", String(painter.mask[index] === 1));
      drawLabel(index);
    }
    const ones = painter.mask.reduce((sum, state) => sum + state, 0);
    count.textContent = `mask = 1: ${ones} of ${countTokens(chips.length)}`;
    drawReadout();
  }

  function drawLabel(index) {
    const label = describe(Math.floor(index / length), index % length, {
      token: tokens[index],
      role: roles[index],
      state: painter.mask[index],
      valueName: model.get("value_name"),
      value: values[index],
      note: notes[index],
    });
    if (labels[index] === label) return;
    labels[index] = label;
    chips[index].setAttribute("aria-label", label);
  }

  function drawShades() {
    chips.forEach((chip, index) => {
      const value = values[index];
      // Padding at 0 stays as it is: nothing is there, and nothing is said of it.
      const plain = value === undefined || (value === 0 && roles[index] === "padding");
      const rgb = plain ? null : gradientColour(value);
      const shade = plain ? "" : rgb ? `rgb(${rgb})` : "unknown";
      if (shades[index] !== shade) {
        shades[index] = shade;
        tint(chip, rgb);
        if (shade) chip.dataset.shade = rgb ? "value" : "unknown";
        else delete chip.dataset.shade;
      }
      drawLabel(index);
    });
    drawReadout();
  }

  function tint(chip, rgb) {
    chip.style.backgroundColor = rgb ? `rgb(${rgb})` : "";
    if (rgb) chip.style.setProperty("--sft-edu-chip-text", `rgb(${inkOn(rgb)})`);
    else chip.style.removeProperty("--sft-edu-chip-text");
  }

  // What one looks at, in words: the chip under the pointer, or the one in focus, whichever was moved last.
  function drawReadout() {
    const index = hovered >= 0 && !byKeys ? hovered : chips.indexOf(document.activeElement);
    const text = index >= 0 ? labels[index] : HINT;
    if (readout.textContent !== text) readout.textContent = text;
  }

  function drawLegend() {
    const present = ROLES.filter((role) => roles.includes(role));
    const name = values.length ? model.get("value_name") : "";
    const content = [...present, name].join();
    if (content === explained) return;
    explained = content;
    // Where values shade the grid, only padding has its own colour there, and so here.
    const sample = (role, state, text, value = name && role !== "padding" ? 0 : null) => {
      const chip = makeText("span", "sft-edu-chip sft-edu-chip-sample", text);
      chip.dataset.role = role;
      chip.dataset.state = state;
      if (value !== null) {
        chip.dataset.shade = "value";
        tint(chip, gradientColour(value));
      }
      return chip;
    };
    const entry = (samples, text) => {
      const item = make("span", "sft-edu-mask-entry");
      item.append(...samples, text);
      return item;
    };
    const entries = present.map((role) =>
      entry([sample(role, 0, role === "padding" ? "·" : role === "eos" ? "eos" : "a")], role),
    );
    if (name) {
      const shades = [[-0.1, "−"], [0, "0"], [0.1, "+"]];
      entries.push(entry(shades.map(([value, sign]) => sample("prompt", 0, sign, value)), name));
    }
    entries.push(entry([sample("prompt", 1, "a")], count)); // last, or others would move as it grows a digit
    legend.replaceChildren(...entries);
  }

  // Fits lines into the width there is. Moves chips, never makes them.
  function place() {
    const longest = Math.max(...tokens.map((token, index) => [...face(token, roles[index])].length));
    const width = ruler.clientWidth || Infinity; // not on the page yet
    layout = makeLayout(rows, length, width, longest);
    root.classList.toggle("sft-edu-mask-compact", layout.compact);
    root.classList.toggle("sft-edu-mask-narrow", width < NARROW);
    for (const [name, value] of Object.entries({
      gutter: `${GUTTER}px`,
      columns: layout.columns,
      "chip-width": `${layout.chipWidth}px`,
      "chip-height": `${layout.chipHeight}px`,
      gap: `${layout.gap}px`,
      "row-gap": `${layout.rowGap}px`,
    })) {
      grid.style.setProperty(`--sft-edu-${name}`, value);
    }
    gutters.forEach((gutter, row) => {
      const starts = Array.from({ length: layout.lines }, (_, line) => line * layout.columns);
      gutter.replaceChildren(
        ...starts.map((start) => makeText("span", start ? "sft-edu-mask-start" : "", start ? `+${start}` : String(row))),
      );
    });
  }

  // --- the model ---

  // Draws one trait. Traits of another shape arrive all in one message: the first of them builds the grid anew.
  function drawing(draw) {
    return () => {
      const given = model.get("tokens");
      if (given.length !== rows || given[0].length !== length) {
        build();
      } else {
        readAll();
        draw();
      }
    };
  }

  const handlers = {
    tokens: drawing(() => {
      drawFaces();
      place();
      drawStates(chips.keys());
    }),
    labels: drawing(() => {
      closeStroke();
      painter = new Painter(painter.mask); // other roles are other sentences: strokes on the old ones mean nothing here
      drawFaces();
      place();
      drawLegend();
      drawShades();
    }),
    mask: drawing(() => drawStates(painter.adopt(maskFromText(model.get("mask"))))),
    values: drawing(() => {
      drawShades();
      drawLegend();
    }),
    value_name: drawing(() => {
      drawShades();
      drawLegend();
    }),
    notes: drawing(drawShades),
  };

  // However many events a frame has, the kernel hears of them once.
  function send() {
    frame ||= requestAnimationFrame(() => {
      frame = 0;
      painter.unsent.clear();
      const focused = [Math.floor(current / length), current % length];
      const state = { mask: maskToText(painter.mask, length), focused };
      const news = Object.entries(state).filter(([name, value]) => String(value) !== String(model.get(name)));
      for (const [name, value] of news) model.set(name, value);
      if (news.length) model.save_changes();
    });
  }

  // --- strokes ---

  function drawStroke(changed) {
    if (!changed.length) return;
    drawStates(changed);
    send();
  }

  function closeStroke() {
    if (drag && grid.hasPointerCapture(drag.pointer)) grid.releasePointerCapture(drag.pointer);
    if (!painter.stroke) return;
    const changed = painter.end();
    if (changed) live.textContent = `${countTokens(changed)} set to ${strokeState}`;
    if (drag) touch(drag.last);
    [drag, reach] = [null, null];
    // The kernel may have refused a part of the stroke while it was being painted. Asked again, it answers again.
    if (maskToText(painter.mask, length) !== model.get("mask")) send();
  }

  function flip(index) {
    closeStroke();
    painter.begin();
    strokeState = 1 - painter.mask[index];
    drawStroke(painter.paint([index], strokeState));
    closeStroke();
  }

  function travel(changed, words) {
    drawStroke(changed);
    if (changed.length) live.textContent = `${countTokens(changed.length)} ${words}`;
  }

  function touch(index) {
    chips[current].tabIndex = -1;
    current = index;
    chips[current].tabIndex = 0;
    chips[current].focus({ preventScroll: Boolean(drag) });
  }

  // --- pointer ---

  function pointOf(event) {
    const box = grid.getBoundingClientRect();
    return [event.clientX - box.left, event.clientY - box.top];
  }

  function chipOf(event) {
    const chip = event.target.closest?.(".sft-edu-chip");
    return chip ? Number(chip.dataset.index) : -1;
  }

  function startDrag() {
    painter.begin();
    strokeState = 1 - painter.mask[drag.last];
    drag.waiting = false;
    touch(drag.last);
    drawStroke(painter.paint([drag.last], strokeState));
  }

  const listeners = {
    pointerdown(event) {
      const index = chipOf(event);
      if (index < 0 || event.button !== 0 || !event.isPrimary || event.ctrlKey) return;
      event.preventDefault(); // no text is selected, and Lab does not select cells
      closeStroke();
      pressed = true;
      if (event.shiftKey && touched) {
        painter.begin();
        strokeState = painter.mask[current];
        drawStroke(painter.paint(rangeOf(current, index), strokeState));
        closeStroke();
        touch(index);
        return;
      }
      // A finger that moves up or down scrolls the page: it paints once it moves sideways, or leaves without moving.
      drag = { pointer: event.pointerId, at: pointOf(event), last: index, waiting: event.pointerType === "touch" };
      grid.setPointerCapture(event.pointerId);
      if (!drag.waiting) startDrag();
    },

    pointermove(event) {
      if (byKeys) {
        byKeys = false;
        drawReadout();
      }
      if (event.pointerId !== drag?.pointer) return;
      const to = pointOf(event);
      if (drag.waiting) {
        if (Math.abs(to[0] - drag.at[0]) < SWIPE) return;
        startDrag();
      }
      const crossed = chipsAlong(layout, drag.at, to);
      drag.at = to;
      hovered = drag.last = crossed.at(-1) ?? drag.last;
      drawStroke(painter.paint(crossed, strokeState));
    },

    pointerup(event) {
      if (event.pointerId !== drag?.pointer) return;
      if (drag.waiting) startDrag();
      closeStroke();
    },

    pointercancel(event) {
      if (event.pointerId !== drag?.pointer) return;
      drawStroke(painter.cancel());
      drag = null;
    },

    lostpointercapture(event) {
      if (event.pointerId !== drag?.pointer) return;
      closeStroke();
      drag = null;
    },

    // Reading aids click without pointer or key.
    click(event) {
      const index = chipOf(event);
      if (index >= 0 && !(pressed && event.detail > 0)) {
        touch(index);
        flip(index);
      }
      pressed = false;
    },

    pointerover(event) {
      hovered = chipOf(event);
      drawReadout();
    },

    pointerleave() {
      hovered = -1;
      drawReadout();
    },

    // --- keys ---

    keydown(event) {
      const index = chipOf(event);
      if (index < 0 || event.altKey) return;
      const key = event.key.toLowerCase();
      if (event.ctrlKey || event.metaKey) {
        if (key !== "z" && key !== "y") return;
        take(event);
        closeStroke();
        if (key === "y" || event.shiftKey) travel(painter.redo(), "set again");
        else travel(painter.undo(), "set back");
        return;
      }
      if (key === " " || key === "enter") {
        take(event);
        if (!event.repeat) flip(index);
        return;
      }
      const next = keyTarget(layout, index, event.key);
      if (next < 0) return;
      take(event);
      if (!event.shiftKey) {
        closeStroke();
        touch(next);
        return;
      }
      if (!reach) {
        closeStroke();
        painter.begin();
        strokeState = painter.mask[index];
        reach = { anchor: index };
      }
      touch(next);
      drawStroke(painter.paintOnly(rangeOf(reach.anchor, next), strokeState));
    },

    keyup(event) {
      if (event.key === "Shift" && reach) closeStroke();
      if (event.key === " ") event.preventDefault(); // Firefox clicks when the key comes up
    },

    focusin(event) {
      const index = chipOf(event);
      byKeys = event.target.matches(":focus-visible");
      if (index >= 0 && index !== current) touch(index);
      touched = true;
      drawReadout();
      send();
    },

    focusout(event) {
      if (reach && !grid.contains(event.relatedTarget)) closeStroke();
      queueMicrotask(drawReadout);
    },
  };

  function take(event) {
    byKeys = true;
    event.preventDefault();
    event.stopPropagation();
  }

  const ending = new AbortController();
  for (const [name, listener] of Object.entries(listeners)) {
    grid.addEventListener(name, listener, { signal: ending.signal });
  }
  for (const [name, handler] of Object.entries(handlers)) model.on(`change:${name}`, handler);
  build();
  const observer = new ResizeObserver(place);
  observer.observe(ruler);

  return () => {
    ending.abort();
    observer.disconnect();
    cancelAnimationFrame(frame);
    for (const [name, handler] of Object.entries(handlers)) model.off(`change:${name}`, handler);
    root.remove();
  };
}

export default { render };
