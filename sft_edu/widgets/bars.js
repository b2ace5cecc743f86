// Horizontal bars on one axis. Rows are made once for a number of rows; after that only texts and lengths change.
// view.js and axis.js stand above this line when it runs.

function render({ model, el }) {
  const root = make("div", "sft-edu-view sft-edu-bars");
  const title = make("div", "sft-edu-bars-title");
  const plot = make("div", "sft-edu-bars-plot");
  const scale = make("div", "sft-edu-bars-scale");
  const axis = make("div", "sft-edu-bars-axis");
  const table = make("div", "sft-edu-bars-table", "table");
  const words = new Words(model.get("words"));
  const line = make("div", "sft-edu-bars-reference");
  const lineLabel = make("div", "sft-edu-bars-reference-label");
  const ticks = Array.from({ length: TICKS }, () => {
    const tick = make("div", "sft-edu-bars-tick");
    tick.append(make("span", "sft-edu-bars-tick-text"));
    return tick;
  });
  root.dir = "ltr"; // an axis runs from left to right, whatever the letters
  for (const picture of [title, scale]) picture.setAttribute("aria-hidden", "true"); // the table says the same
  axis.append(...ticks, line, lineLabel);
  scale.append(axis);
  plot.append(scale, table);
  root.append(title, plot, words.shown, words.heard);
  el.append(root);

  let bars = [];
  // In digits. Grows and never shrinks, so that bars keep their place; starts wide enough for most labels, so that the
  // axes of bars one below the other are as long.
  const widest = { label: 0, text: 0 };

  function makeBar() {
    const bar = {
      row: make("div", "sft-edu-bars-row", "row"),
      head: make("div", "sft-edu-bars-head", "rowheader"),
      label: make("span", "sft-edu-bars-label"),
      note: make("span", "sft-edu-bars-note"),
      track: make("div", "sft-edu-bars-track"),
      fill: make("div", "sft-edu-bars-fill"),
      text: make("div", "sft-edu-bars-text", "cell"),
    };
    bar.track.setAttribute("aria-hidden", "true");
    bar.head.append(bar.label, bar.note);
    bar.track.append(bar.fill);
    bar.row.append(bar.head, bar.track, bar.text);
    return bar;
  }

  function drawRows() {
    const rows = model.get("rows");
    if (rows.length !== bars.length) {
      bars = rows.map(makeBar);
      table.replaceChildren(...bars.map((bar) => bar.row));
    }
    rows.forEach((row, index) => {
      const bar = bars[index];
      write(bar.label, row.label);
      write(bar.note, row.note);
      write(bar.text, row.text);
      if (bar.fill.dataset.colour !== row.colour) bar.fill.dataset.colour = row.colour;
      widen("label", Math.max([...row.label].length, [...row.note].length * 0.85));
      widen("text", [...row.text].length);
    });
    drawLengths();
  }

  function widen(column, needed) {
    const width = Math.min(Math.ceil(needed), 32);
    if (width <= widest[column]) return;
    widest[column] = width;
    root.style.setProperty(`--sft-edu-bars-${column}`, `${width}ch`);
  }

  function drawLengths() {
    const [limits, log] = [model.get("limits"), model.get("log")];
    const from = log ? 0 : Math.min(1, Math.max(0, place(0, limits, log)));
    model.get("rows").slice(0, bars.length).forEach(({ value }, index) => { // other rows may come in this message
      const { style, dataset } = bars[index].fill;
      const shown = value !== null && !(log && value <= 0);
      const to = shown ? place(value, limits, log) : from;
      const end = Math.min(1, Math.max(0, to));
      style.left = `${100 * Math.min(from, end)}%`;
      style.width = `${100 * Math.abs(end - from)}%`;
      dataset.beyond = to > 1 ? "high" : to < 0 && end !== from ? "low" : "";
      dataset.empty = String(!shown || end === from);
    });
  }

  function drawAxis() {
    const [limits, log] = [model.get("limits"), model.get("log")];
    const found = ticksOf(limits, log);
    ticks.forEach((tick, index) => {
      tick.hidden = index >= found.length;
      if (tick.hidden) return;
      tick.style.left = `${100 * place(found[index], limits, log)}%`;
      tick.dataset.zero = String(!log && found[index] === 0);
      write(tick.firstChild, tickText(found[index]));
    });
    drawReference();
    drawLengths();
  }

  function drawReference() {
    const [limits, log, reference] = [model.get("limits"), model.get("log"), model.get("reference")];
    const at = reference === null ? NaN : log && reference <= 0 ? -1 : place(reference, limits, log);
    const percent = 100 * Math.min(1, Math.max(0, at));
    root.dataset.reference = String(reference !== null);
    line.hidden = !(at >= 0 && at <= 1);
    lineLabel.hidden = reference === null;
    if (reference === null) return;
    line.style.left = lineLabel.style.left = `${percent}%`;
    lineLabel.style.transform = `translateX(${-percent}%)`; // stays above the axis at both its ends
    const label = model.get("reference_label");
    write(lineLabel, at < 0 ? `◂ ${label}` : at > 1 ? `${label} ▸` : label);
  }

  function drawName() {
    const [reference, label] = [model.get("reference"), model.get("reference_label")];
    const name = [model.get("title"), reference === null ? "" : `reference line: ${label}`].filter(Boolean).join("; ");
    if (table.getAttribute("aria-label") !== name) table.setAttribute("aria-label", name);
  }

  function drawTitle() {
    write(title, model.get("title"));
    drawName();
  }

  function drawMark() {
    drawReference();
    drawName();
  }

  function drawCount() {
    root.dataset.drawn = String(model.get("drawn"));
  }

  const unlisten = listen(model, {
    "change:rows": drawRows,
    "change:title": drawTitle,
    "change:limits": drawAxis,
    "change:log": drawAxis,
    "change:reference": drawMark,
    "change:reference_label": drawMark,
    "change:words": () => words.show(model.get("words")),
    change: drawCount, // comes after the others, when all of a message is drawn
  });

  widen("label", 22);
  widen("text", 9);
  drawRows();
  drawAxis();
  drawTitle();
  drawCount();
  return () => {
    words.stop();
    unlisten();
    root.remove();
  };
}

export default { render };
