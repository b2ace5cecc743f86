// Run by `node --test tests/js/token_grid.test.mjs`; pytest does so too, see tests/test_token_grid.py.
import assert from "node:assert/strict";
import { readFile } from "node:fs/promises";
import { test } from "node:test";

// As a data URL, because to some versions of node a .js file without a package.json is not an ES module.
const source = await readFile(new URL("../../sft_edu/widgets/token_grid.js", import.meta.url), "utf8");
const {
  GUTTER,
  Painter,
  chipAt,
  chipsAlong,
  countTokens,
  describe,
  face,
  formatValue,
  gradientColour,
  keyTarget,
  makeLayout,
  maskFromText,
  maskToText,
  rangeOf,
} = await import(`data:text/javascript,${encodeURIComponent(source)}`);

const centre = (layout, index) => {
  const [row, position] = [Math.floor(index / layout.length), index % layout.length];
  const [line, column] = [Math.floor(position / layout.columns), position % layout.columns];
  return [
    GUTTER + column * layout.chipPitch + layout.chipWidth / 2,
    row * layout.rowPitch + line * layout.linePitch + layout.chipHeight / 2,
  ];
};
const painter = (text) => new Painter(maskFromText(text));

test("a mask survives the way to text and back", () => {
  for (const text of ["1", "1101 1111", "000 010 101"]) {
    assert.equal(maskToText(maskFromText(text), text.split(" ")[0].length), text);
  }
});

test("rows wrap into as few lines as fit, about equally long", () => {
  assert.equal(makeLayout(2, 21, 800, 3).lines, 1);
  assert.equal(makeLayout(2, 21, Infinity, 3).lines, 1);
  const narrow = makeLayout(2, 21, 460, 3);
  assert.deepEqual([narrow.columns, narrow.lines], [12, 2]);
  for (const length of [1, 2, 21, 48, 49, 128, 1000]) {
    for (let width = 0; width < 1400; width += 7) {
      for (const longest of [1, 3, 80]) {
        const layout = makeLayout(3, length, width, longest);
        const fit = Math.max(Math.floor((width - GUTTER + layout.gap) / layout.chipPitch), 1);
        assert.ok(layout.columns >= 1 && layout.columns <= Math.min(fit, length), `${length} in ${width}`);
        assert.equal(layout.lines, Math.ceil(length / Math.min(fit, length)), `${length} in ${width}`);
      }
    }
  }
});

test("a chip is as large as a finger needs, gap included", () => {
  for (const length of [21, 128]) {
    const layout = makeLayout(1, length, 800, 1);
    assert.ok(Math.min(layout.chipPitch, layout.linePitch) >= 24);
  }
});

test("every chip is found at its centre, and nothing outside", () => {
  for (const [rows, length, width] of [[1, 1, 100], [2, 21, 800], [2, 21, 460], [16, 128, 800], [3, 7, 100]]) {
    const layout = makeLayout(rows, length, width, 3);
    for (let index = 0; index < rows * length; index++) {
      assert.equal(chipAt(layout, ...centre(layout, index)), index);
    }
    const [right, bottom] = [GUTTER + layout.columns * layout.chipPitch, rows * layout.rowPitch];
    for (const point of [[GUTTER - 1, 5], [right + 1, 5], [GUTTER + 5, -1], [GUTTER + 5, bottom + 1]]) {
      assert.equal(chipAt(layout, ...point), -1);
    }
  }
  const wrapped = makeLayout(2, 21, 460, 3); // lines of 12 and 9
  assert.equal(chipAt(wrapped, GUTTER + 10 * wrapped.chipPitch, wrapped.linePitch + 5), -1);
});

test("a fast pointer crosses every chip on its way", () => {
  const layout = makeLayout(16, 128, 900, 1);
  const along = (from, to) => chipsAlong(layout, centre(layout, from), centre(layout, to));
  assert.deepEqual(along(0, layout.columns - 1), rangeOf(0, layout.columns - 1));
  assert.deepEqual(along(5, 2), [5, 4, 3, 2]);
  assert.deepEqual(along(7, 7), [7]);
  const down = along(0, 15 * 128);
  assert.equal(down.length, 15 * layout.lines + 1);
  const diagonal = along(0, 15 * 128 + layout.columns - 1);
  assert.equal(new Set(diagonal.map((index) => Math.floor(index / 128))).size, 16);
});

test("keys lead to neighbours, row ends and the lines above and below", () => {
  const layout = makeLayout(2, 21, 460, 3); // lines of 12 and 9
  const lead = (index, ...keys) => keys.reduce((at, key) => keyTarget(layout, at, `Arrow${key}`), index);
  assert.equal(lead(0, "Right", "Right", "Left"), 1);
  assert.equal(lead(0, "Left"), 0);
  assert.equal(lead(20, "Right"), 20);
  assert.equal(lead(3, "Down"), 15);
  assert.equal(lead(11, "Down"), 20, "the line below is shorter");
  assert.equal(lead(15, "Down"), 21 + 3, "the next sequence");
  assert.equal(lead(24, "Up", "Up"), 3);
  assert.equal(lead(3, "Up"), 3);
  assert.equal(lead(21 + 15, "Down"), 21 + 15);
  assert.equal(keyTarget(layout, 30, "Home"), 21);
  assert.equal(keyTarget(layout, 22, "End"), 41);
  assert.equal(keyTarget(layout, 22, "x"), -1);
});

test("a range runs in reading order, in either direction", () => {
  assert.deepEqual(rangeOf(3, 6), [3, 4, 5, 6]);
  assert.deepEqual(rangeOf(6, 3), [3, 4, 5, 6]);
  assert.deepEqual(rangeOf(2, 2), [2]);
});

test("one stroke is one step of undo and redo", () => {
  const p = painter("0100");
  p.begin();
  assert.deepEqual(p.paint([0], 1), [0]);
  assert.deepEqual(p.paint([0, 1, 2], 1), [2], "only what changed is drawn");
  assert.equal(p.end(), 2);
  assert.equal(maskToText(p.mask, 4), "1110");
  assert.deepEqual(p.undo(), [0, 2]);
  assert.equal(maskToText(p.mask, 4), "0100");
  assert.deepEqual(p.undo(), []);
  assert.deepEqual(p.redo(), [0, 2]);
  assert.equal(maskToText(p.mask, 4), "1110");
  p.undo();
  p.begin();
  p.paint([3], 1);
  p.end();
  assert.deepEqual(p.redo(), [], "a new stroke ends what could be redone");
});

test("a stroke that changes nothing is no step", () => {
  const p = painter("01");
  p.begin();
  p.paint([1], 1);
  assert.equal(p.end(), 0);
  assert.deepEqual(p.undo(), []);
});

test("a range that shrinks gives back what it leaves", () => {
  const p = painter("10100");
  p.begin();
  p.paintOnly(rangeOf(0, 4), 1);
  assert.equal(maskToText(p.mask, 5), "11111");
  assert.deepEqual(p.paintOnly(rangeOf(0, 1), 1).sort(), [3, 4]);
  assert.equal(maskToText(p.mask, 5), "11100");
  assert.equal(p.end(), 1);
  assert.deepEqual(p.undo(), [1]);
});

test("a cancelled stroke has not been", () => {
  const p = painter("0000");
  p.begin();
  p.paint([0, 1], 1);
  assert.deepEqual(p.cancel(), [0, 1]);
  assert.equal(maskToText(p.mask, 4), "0000");
  assert.deepEqual(p.undo(), []);
});

test("the kernel's mask wins, save under the finger and for what it has yet to hear", () => {
  const p = painter("0000");
  p.begin();
  p.paint([0], 1);
  assert.deepEqual(p.adopt(maskFromText("0011")), [2, 3]);
  p.end();
  assert.equal(maskToText(p.mask, 4), "1011");
  assert.deepEqual(p.adopt(maskFromText("0011")), [], "unsent");
  p.unsent.clear();
  assert.deepEqual(p.adopt(maskFromText("0011")), [0]);
});

test("undo leaves alone what the kernel changed since", () => {
  const p = painter("0000");
  p.begin();
  p.paint([0, 1], 1);
  p.end();
  p.unsent.clear();
  p.adopt(maskFromText("1101"));
  p.undo();
  assert.equal(maskToText(p.mask, 4), "0001");
});

test("undo skips a stroke that is undone already", () => {
  const p = painter("00");
  for (const index of [0, 1]) {
    p.begin();
    p.paint([index], 1);
    p.end();
  }
  p.unsent.clear();
  p.adopt(maskFromText("10"));
  assert.deepEqual(p.undo(), [0]);
});

test("the memory of strokes is bounded", () => {
  const p = painter("0");
  for (let stroke = 0; stroke < 1000; stroke++) {
    p.begin();
    p.paint([0], 1 - p.mask[0]);
    p.end();
  }
  assert.equal(p.done.length, 200);
});

test("random strokes: undoing all of them leads back, and redoing leads there again", () => {
  let seed = 1;
  const random = (below) => (seed = (seed * 48271) % 2147483647) % below;
  for (let round = 0; round < 200; round++) {
    const p = new Painter(Uint8Array.from({ length: 40 }, () => random(2)));
    const start = maskToText(p.mask, 40);
    for (let stroke = 0; stroke < 20; stroke++) {
      p.begin();
      const state = random(2);
      for (let move = 0; move < 3; move++) {
        if (random(2)) p.paintOnly(rangeOf(random(40), random(40)), state);
        else p.paint([random(40)], state);
      }
      if (random(4)) p.end();
      else p.cancel();
      if (random(3) === 0) p.undo();
      if (random(3) === 0) p.redo();
    }
    while (p.redo().length);
    const end = maskToText(p.mask, 40);
    while (p.undo().length);
    assert.equal(maskToText(p.mask, 40), start);
    while (p.redo().length);
    assert.equal(maskToText(p.mask, 40), end);
  }
});

test("words", () => {
  const chip = { token: "L", role: "response", state: 1, valueName: "gradient", value: -0.25 };
  assert.equal(describe(0, 3, chip), "sequence 0, token 3: L, response, mask 1, gradient -0.2500");
  assert.equal(
    describe(1, 0, { ...chip, value: undefined, note: "log p -5.6500" }),
    "sequence 1, token 0: L, response, mask 1, log p -5.6500",
  );
  assert.deepEqual(
    [0, -0, 0.25, -1e-9, 1e7, NaN, Infinity, -Infinity].map(formatValue),
    ["0", "0", "0.2500", "-1.00e-9", "1.00e+7", "NaN", "inf", "-inf"],
  );
  assert.deepEqual([countTokens(1), countTokens(5)], ["1 token", "5 tokens"]);
  assert.deepEqual([face("<eos>", "eos"), face("<pad>", "padding"), face("<eos>", "response")], ["eos", "·", "<eos>"]);
});

test("white is exactly 0, orange below, purple above, and nothing is no number's colour", () => {
  assert.deepEqual(gradientColour(0), [255, 255, 255]);
  assert.deepEqual(gradientColour(-0), [255, 255, 255]);
  assert.equal(gradientColour(NaN), null);
  assert.deepEqual(gradientColour(Infinity), gradientColour(1));
  for (const size of [1e-4, 0.01, 0.25, 1]) {
    const [below, above] = [gradientColour(-size), gradientColour(size)];
    assert.ok(below[0] > below[2] && above[2] > above[1]);
  }
});
