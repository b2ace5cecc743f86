// Shows a PNG with its description. The next picture is decoded before it replaces the last one, so nothing flickers.
function render({ model, el }) {
  const image = document.createElement("img");
  image.className = "sft-edu-figure";
  el.appendChild(image);
  let shownUrl = null;
  let newest = 0;

  async function show() {
    const turn = ++newest;
    const url = URL.createObjectURL(new Blob([model.get("png")], { type: "image/png" }));
    const next = new Image();
    next.src = url;
    try {
      await next.decode();
    } catch (error) {
      URL.revokeObjectURL(url);
      return;
    }
    if (turn !== newest) {
      URL.revokeObjectURL(url); // a later picture was faster
      return;
    }
    image.width = model.get("width");
    image.height = model.get("height");
    image.src = url;
    if (shownUrl) URL.revokeObjectURL(shownUrl);
    shownUrl = url;
  }

  // Two different texts can come with the same picture.
  const describe = () => {
    image.alt = model.get("alt");
  };

  model.on("change:png", show);
  model.on("change:alt", describe);
  describe();
  show();
  return () => {
    newest++;
    model.off("change:png", show);
    model.off("change:alt", describe);
    if (shownUrl) URL.revokeObjectURL(shownUrl);
  };
}

export default { render };
