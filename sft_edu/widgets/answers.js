// A table of answers. Rows are made once for a number of rows; after that only texts change.
// view.js stands above this line when it runs.

const COLUMNS = ["prompt", "answer", "wanted"];

function makeRow() {
  const row = make("tr", "");
  const prompt = make("th", "sft-edu-answers-prompt");
  prompt.scope = "row";
  row.append(prompt, make("td", "sft-edu-answers-answer"), make("td", ""), make("td", "sft-edu-answers-verdict"));
  return row;
}

function makeHead() {
  const row = make("tr", "");
  for (const name of [...COLUMNS, "verdict"]) {
    const cell = make("th", "");
    cell.scope = "col";
    write(cell, name);
    row.append(cell);
  }
  return row;
}

function render({ model, el }) {
  const root = make("div", "sft-edu-view sft-edu-answers");
  const table = make("table", "sft-edu-answers-table");
  const [title, head, body] = [make("caption", ""), make("thead", ""), make("tbody", "")];
  head.append(makeHead());
  table.append(title, head, body);
  root.append(table);
  el.append(root);

  function draw() {
    const rows = model.get("rows");
    if (rows.length !== body.childElementCount) body.replaceChildren(...rows.map(makeRow));
    rows.forEach((row, index) => {
      const cells = body.children[index].children;
      COLUMNS.forEach((name, column) => write(cells[column], row[name]));
      write(cells[COLUMNS.length], row.right ? "✓ right" : "✗ wrong");
      cells[COLUMNS.length].dataset.right = String(row.right);
    });
    write(title, model.get("title"));
    root.dataset.drawn = String(model.get("drawn"));
  }

  const unlisten = listen(model, { change: draw });
  draw();
  return () => {
    unlisten();
    root.remove();
  };
}

export default { render };
