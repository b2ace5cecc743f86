// JupyterLab listens to single keys everywhere: an arrow on a radio button would move to the next cell. Elements with
// this attribute keep their keys to themselves; it works on the element alone, not on an ancestor.
//
// ipywidgets leaves some controls without a name for a screen reader: the handle of a slider gets the label before it,
// a button of icons the name of its icon.
const ICONS = { "fa-play": "play or pause", "fa-stop": "stop", "fa-retweet": "repeat" };

function nameOf(element) {
  if (element.matches(".noUi-handle")) {
    return element.closest(".widget-inline-hbox, .widget-inline-vbox")?.querySelector(".widget-label")?.textContent;
  }
  if (element.matches(".jupyter-button") && !element.textContent.trim() && !element.title) {
    const icon = element.querySelector(".fa");
    return Object.entries(ICONS).find(([name]) => icon?.classList.contains(name))?.[1];
  }
}

function render({ el }) {
  const observer = new MutationObserver(protect);
  let frame = requestAnimationFrame(attach);

  function attach() {
    const box = el.closest(".jp-OutputArea-output, .jupyter-widgets-output-area, .cell-output") ?? el.parentElement;
    if (!el.isConnected || !box) {
      frame = requestAnimationFrame(attach); // drawn before it is part of the page
      return;
    }
    protect([{ target: box }]);
    observer.observe(box, { childList: true, subtree: true });
  }

  function protect(changes) {
    for (const { target } of changes) {
      for (const element of target.querySelectorAll("button, input, select, [tabindex]")) {
        element.dataset.lmSuppressShortcuts = "true";
        const name = nameOf(element);
        if (name && element.getAttribute("aria-label") !== name) element.setAttribute("aria-label", name);
      }
    }
  }

  el.hidden = true;
  return () => {
    cancelAnimationFrame(frame);
    observer.disconnect();
  };
}

export default { render };
