// Curves in panels side by side. Panels and lines are made once; after that only their texts and points change.
// view.js and axis.js stand above this line when it runs.

const SVG = "http://www.w3.org/2000/svg";
const SIZE = 1000; // of the drawing, both ways; the page stretches it

function makeSvg(tag, className) {
  const node = document.createElementNS(SVG, tag);
  node.setAttribute("class", className);
  return node;
}

// The points of a polyline. The last one comes twice, so that a line of one point is a dot.
export function pathOf(points, end, { limits, log }) {
  const shown = points.filter(([, y]) => !log || y > 0);
  const placed = shown.map(([x, y]) => [(SIZE * x) / end, SIZE * (1 - place(y, limits, log))]);
  return [...placed, ...placed.slice(-1)].map((xy) => xy.map((z) => z.toFixed(1)).join(",")).join(" ");
}

// Exactly so many children, made as needed; those there already are kept.
function fit(parent, count, makeOne) {
  while (parent.childElementCount > count) parent.lastChild.remove();
  while (parent.childElementCount < count) parent.append(makeOne());
  return [...parent.children];
}

function makePanel() {
  const panel = {
    box: make("figure", "sft-edu-curves-panel", "img"),
    head: make("div", "sft-edu-curves-head"),
    title: make("span", "sft-edu-curves-title"),
    text: make("span", "sft-edu-curves-text"),
    legend: make("div", "sft-edu-curves-legend"),
    plot: make("div", "sft-edu-curves-plot"),
    across: make("div", "sft-edu-curves-across"),
    down: make("div", "sft-edu-curves-down"),
    drawing: makeSvg("svg", "sft-edu-curves-drawing"),
  };
  panel.drawing.setAttribute("viewBox", `0 0 ${SIZE} ${SIZE}`);
  panel.drawing.setAttribute("preserveAspectRatio", "none");
  panel.head.append(panel.title, panel.text);
  panel.plot.append(panel.down, panel.across, panel.drawing);
  panel.box.append(panel.head, panel.legend, panel.plot);
  return panel;
}

function makeEntry() {
  const entry = make("span", "sft-edu-curves-entry");
  const sample = makeSvg("svg", "sft-edu-curves-sample");
  sample.setAttribute("viewBox", "0 0 20 6");
  const line = makeSvg("polyline", "sft-edu-curves-line");
  line.setAttribute("points", "1,3 19,3");
  sample.append(line);
  entry.append(sample, make("span", ""));
  return entry;
}

function drawTicks(box, side, ticks, placeOf) {
  fit(box, ticks.length, () => make("span", "sft-edu-curves-tick")).forEach((node, index) => {
    node.style[side] = `${100 * placeOf(ticks[index])}%`;
    write(node, tickText(ticks[index]));
  });
}

function drawLegend(panel, lines) {
  fit(panel.legend, lines.length, makeEntry).forEach((entry, index) => {
    entry.firstChild.firstChild.dataset.look = lines[index].look;
    write(entry.lastChild, lines[index].label);
  });
}

function drawPanel(panel, settings, lines, before, end) {
  write(panel.title, settings.title);
  write(panel.text, settings.text);
  const said = [settings.text, ...[...lines, ...before].map((line) => line.label)].filter(Boolean).join("; ");
  panel.box.setAttribute("aria-label", `${settings.title}: ${said}`);
  drawTicks(panel.down, "top", ticksOf(settings.limits, settings.log, 4), (y) => 1 - place(y, settings.limits, settings.log));
  drawTicks(panel.across, "left", ticksOf([0, end], false, 4), (x) => x / end);
  drawLegend(panel, [...lines, ...before]);
  const drawn = [...before, ...lines]; // the later ones lie above
  fit(panel.drawing, drawn.length, () => makeSvg("polyline", "sft-edu-curves-line")).forEach((node, index) => {
    node.dataset.look = drawn[index].look;
    node.setAttribute("points", pathOf(drawn[index].points, end, settings));
  });
}

function render({ model, el }) {
  const root = make("div", "sft-edu-view sft-edu-curves");
  const status = make("div", "sft-edu-curves-status");
  const row = make("div", "sft-edu-curves-row");
  const xTitle = make("div", "sft-edu-curves-x-title");
  const words = new Words(model.get("words"));
  root.dir = "ltr"; // an axis runs from left to right, whatever the letters
  root.append(status, row, xTitle, words.shown, words.heard);
  el.append(root);
  let panels = [];

  function drawPanels() {
    const [settings, end] = [model.get("panels"), model.get("end")];
    if (settings.length !== panels.length) {
      panels = settings.map(makePanel);
      row.replaceChildren(...panels.map((panel) => panel.box));
    }
    panels.forEach((panel, index) => {
      const [lines, before] = ["lines", "before"].map((name) => model.get(name).filter((line) => line.panel === index));
      drawPanel(panel, settings[index], lines, before, end);
    });
  }

  // Comes when all of a message is there. What did not change costs nothing: texts are compared.
  function draw() {
    drawPanels();
    write(status, model.get("status"));
    write(xTitle, model.get("x_title"));
    root.dataset.drawn = String(model.get("drawn"));
  }

  const unlisten = listen(model, { "change:words": () => words.show(model.get("words")), change: draw });
  draw();
  return () => {
    words.stop();
    unlisten();
    root.remove();
  };
}

export default { render };
