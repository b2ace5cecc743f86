// Two buttons that ask the kernel for a file and download it.

function render({ model, el }) {
  const root = document.createElement("div");
  const status = document.createElement("span");
  const view = `${Date.now()}-${Math.random()}-`; // every view hears the answer; this one asked
  const urls = new Set();
  const timers = new Set();
  let asked = 0;

  root.className = "sft-edu-save";
  Object.assign(root.style, { display: "flex", flexWrap: "wrap", alignItems: "center", gap: "2px 4px" });
  Object.assign(status.style, {
    flex: "1 1 12em",
    minWidth: "0",
    overflowWrap: "anywhere",
    color: "var(--jp-content-font-color1, #1b1f24)",
    font: "12px/18px var(--jp-ui-font-family, system-ui, sans-serif)",
  });
  status.className = "sft-edu-save-status";
  status.setAttribute("role", "status");

  const buttons = ["png", "svg"].map((format) => {
    const button = document.createElement("button");
    button.type = "button";
    button.className = "jupyter-widgets jupyter-button sft-edu-save-button";
    button.textContent = `save ${format.toUpperCase()}`;
    button.dataset.format = format;
    button.dataset.lmSuppressShortcuts = "true"; // or x, pressed on a button, cuts the cell
    button.addEventListener("click", () => ask(format));
    return button;
  });
  root.append(...buttons, status);
  el.append(root);

  function later(action, milliseconds) {
    const timer = setTimeout(() => {
      timers.delete(timer);
      action();
    }, milliseconds);
    timers.add(timer);
  }

  function ask(format) {
    const number = ++asked;
    status.textContent = `drawing the ${format.toUpperCase()} …`;
    root.dataset.state = "asked";
    model.send({ kind: "save", format, request: view + number });
    later(() => {
      if (number === asked && root.dataset.state === "asked") status.textContent = "The kernel has not answered yet.";
    }, 10_000);
  }

  function answer(message, buffers) {
    if (message?.kind !== "saved" || !String(message.request).startsWith(view)) return;
    if (message.error !== undefined) {
      root.dataset.state = "failed";
      status.textContent = `⚠ Not saved. ${message.error}`;
      return;
    }
    download(message.file, buffers[0]);
    root.dataset.state = "saved";
    status.textContent = `saved ${message.file}`;
  }

  function download(name, bytes) {
    const type = name.endsWith(".svg") ? "image/svg+xml" : "image/png";
    const url = URL.createObjectURL(new Blob([bytes], { type }));
    const link = document.createElement("a");
    link.href = url;
    link.download = name;
    link.click();
    urls.add(url);
    later(() => release(url), 60_000); // the browser may still be reading
  }

  function release(url) {
    URL.revokeObjectURL(url);
    urls.delete(url);
  }

  function drawName() {
    for (const button of buttons) button.title = `${model.get("name")}.${button.dataset.format}`;
  }

  function drawCount() {
    root.dataset.drawn = String(model.get("drawn"));
  }

  const handlers = { "msg:custom": answer, "change:name": drawName, change: drawCount };
  for (const [event, handler] of Object.entries(handlers)) model.on(event, handler);
  drawName();
  drawCount();
  return () => {
    timers.forEach(clearTimeout);
    urls.forEach(release);
    for (const [event, handler] of Object.entries(handlers)) model.off(event, handler);
    root.remove();
  };
}

export default { render };
