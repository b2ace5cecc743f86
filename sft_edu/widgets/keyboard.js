// What the controls of ipywidgets lack for those who use keys or a screen reader.
//
// JupyterLab listens to single keys everywhere: an arrow on a radio button would move to the next cell. Elements with
// data-lm-suppress-shortcuts keep their keys to themselves; it works on the element alone, not on an ancestor.
//
// Some controls have no name: the handle of a slider and the number after it get the label before them, a button of
// icons the name of its icon, a group of radio buttons the text above it.
//
// A number typed after a slider counts on Enter alone, and one out of range is put back without a word. Here it also
// counts when it is left, and this widget, otherwise invisible, says the range.
//
// The key End moves a slider to where its range ended when it was made; here, to where the range ends now.
const GUARDED = "button, input, select, [tabindex], [contenteditable]";
const ICONS = { "fa-play": "play or pause", "fa-stop": "stop, back to 0", "fa-retweet": "repeat" };

function nameOf(element) {
  if (element.matches(".noUi-handle, .widget-readout")) {
    return element.closest(".widget-inline-hbox, .widget-inline-vbox")?.querySelector(".widget-label")?.textContent;
  }
  if (element.matches(".jupyter-button") && !element.textContent.trim() && !element.title) {
    const icon = element.querySelector(".fa");
    return Object.entries(ICONS).find(([name]) => icon?.classList.contains(name))?.[1];
  }
}

function handleOf(readout) {
  return readout.parentElement.querySelector(".noUi-handle");
}

// A handle knows its place, which on a logarithmic slider is not the number but its exponent.
function isLogarithmic(readout) {
  const [place, number] = [Number(handleOf(readout).ariaValueNow), Number(readout.textContent)];
  return Math.abs(10 ** place / number - 1) < 0.1;
}

function rangeOf(handle) {
  const ends = [handle.ariaValueMin, handle.ariaValueMax].map(Number);
  return handle.dataset.logarithmic === "true" ? ends.map((end) => Number((10 ** end).toPrecision(6))) : ends;
}

// Radio buttons without a common name are no group: Tab would stop at each of them.
function group(box) {
  const radios = [...box.querySelectorAll("input[type=radio]")];
  if (radios.every((radio) => radio.name)) return;
  const name = `sft-edu-${Math.random()}`;
  for (const radio of radios) radio.name = name;
  box.setAttribute("role", "radiogroup");
  box.setAttribute("aria-label", box.closest(".widget-radio")?.previousElementSibling?.textContent ?? "");
}

// What is wrong with a typed number, if anything. The minus sign that ipywidgets writes is one that it cannot read.
function complaint(readout) {
  readout.textContent = readout.textContent.trim().replace("−", "-");
  const text = readout.textContent;
  const [low, high] = rangeOf(handleOf(readout));
  const fits = text !== "" && Number(text) >= low && Number(text) <= high;
  return fits ? "" : `${nameOf(readout)}: got ${text || "nothing"}; expected ${low} to ${high}`;
}

function render({ el }) {
  const observer = new MutationObserver(protect);
  const ending = new AbortController();
  let typed = null; // where a number was typed and not confirmed
  let frame = requestAnimationFrame(attach);

  function attach() {
    const box = el.closest(".jp-OutputArea-output, .jupyter-widgets-output-area, .cell-output") ?? el.parentElement;
    if (!el.isConnected || !box) {
      frame = requestAnimationFrame(attach); // drawn before it is part of the page
      return;
    }
    protect([{ target: box }]);
    observer.observe(box, { childList: true, subtree: true });
    for (const [event, listener] of Object.entries({ input: onInput, keydown: onKeydown, focusout: onFocusout })) {
      box.addEventListener(event, listener, { capture: true, signal: ending.signal });
    }
  }

  function onInput({ target }) {
    if (target.matches(".widget-readout") && handleOf(target)) typed = target;
  }

  // Comes before ipywidgets reads the number, and before noUiSlider moves its handle.
  function onKeydown(event) {
    const { key, target } = event;
    if (key === "End" && target.matches(".noUi-handle")) {
      const { noUiSlider } = target.closest(".noUi-target");
      event.preventDefault();
      event.stopPropagation();
      noUiSlider.set(noUiSlider.options.range.max);
    }
    const confirmed = key === "Enter" && target.matches(".widget-readout") && handleOf(target);
    el.textContent = confirmed ? complaint(target) : "";
    el.hidden = !el.textContent;
    if (confirmed) typed = null;
  }

  function onFocusout({ target }) {
    if (target !== typed) return;
    target.dispatchEvent(new KeyboardEvent("keydown", { key: "Enter", keyCode: 13, bubbles: true }));
  }

  function protect(changes) {
    for (const { target } of changes) {
      for (const box of target.querySelectorAll(".widget-radio-box")) group(box);
      for (const element of target.querySelectorAll(GUARDED)) {
        if (element.matches(".widget-readout") && element.role !== "textbox") {
          element.role = "textbox";
          if (handleOf(element)) handleOf(element).dataset.logarithmic = String(isLogarithmic(element));
        }
        element.classList.add("sft-edu-key");
        element.dataset.lmSuppressShortcuts = "true";
        const name = nameOf(element);
        if (name && element.getAttribute("aria-label") !== name) element.setAttribute("aria-label", name);
      }
    }
  }

  el.hidden = true;
  el.setAttribute("role", "alert");
  return () => {
    ending.abort();
    cancelAnimationFrame(frame);
    observer.disconnect();
  };
}

export default { render };
