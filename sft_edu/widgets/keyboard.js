// JupyterLab listens to single keys everywhere: an arrow on a radio button would move to the next cell. Elements with
// this attribute keep their keys to themselves; it works on the element alone, not on an ancestor.
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
