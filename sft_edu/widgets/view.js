// What the views have in common. It stands above the script of each when that runs; page_text puts it there.

const QUIET = 800; // milliseconds without a change, before words are read out

function make(tag, className, role = "") {
  const node = document.createElement(tag);
  node.className = className;
  if (role) node.setAttribute("role", role);
  return node;
}

function write(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

// A sentence below a view, which a screen reader hears once it has stopped changing.
class Words {
  constructor(text) {
    this.shown = make("p", "sft-edu-words");
    this.heard = make("div", "sft-edu-live", "status");
    this.shown.setAttribute("aria-hidden", "true"); // the live region says the same
    write(this.shown, text);
    write(this.heard, text);
  }

  show(text) {
    write(this.shown, text);
    this.announce(text, QUIET);
  }

  announce(text, delay) {
    this.stop();
    this.timer = setTimeout(() => write(this.heard, text), delay);
  }

  stop() {
    clearTimeout(this.timer);
  }
}

// Returns what ends it.
function listen(model, handlers) {
  for (const [event, handler] of Object.entries(handlers)) model.on(event, handler);
  return () => {
    for (const [event, handler] of Object.entries(handlers)) model.off(event, handler);
  };
}
