// Run by `node --test tests/js/step_ahead.test.mjs`; pytest does so too, see tests/test_step_ahead.py, and there the
// kernel's arithmetic is the judge.
import assert from "node:assert/strict";
import { readFile } from "node:fs/promises";
import { test } from "node:test";

// As a data URL, because to some versions of node a .js file without a package.json is not an ES module.
const source = await readFile(new URL("../../sft_edu/widgets/step_ahead.js", import.meta.url), "utf8");
const { compact, fixed, stagesAhead } = await import(`data:text/javascript,${encodeURIComponent(source)}`);

const NOTES = { first: "G", second: "G", uses_constant: true, formula: "c·G²" };
const EXAMPLE = {
  log_probs: [[-0.5, -0.3, -0.8, -0.2].map(Math.fround), [-0.4, -0.6, -0.3, -0.5].map(Math.fround)],
  mask: [[1, 1, 0, 1], [1, 1, 1, 1]],
  steps: 2,
  constant: 1,
  rule: NOTES,
};

const lines = (stages) =>
  Object.entries(stages).map(([name, { symbolic, numeric, value }]) => `${name}: ${symbolic} = ${numeric} -> ${value}`);

test("the worked example of the course notes", () => {
  assert.deepEqual(lines(stagesAhead(EXAMPLE)), [
    "num_tokens: Σ m = 3 + 4 -> 7",
    "masked_sum: Σ m·log p / c = -2.8000 / 1 -> -2.8000",
    "loss: -S / G = -(-2.8000) / 2 -> 1.4000",
    "scaled_loss: L / G = 1.4000 / 2 -> 0.7000",
    "backward: -m / (c·G²) = -m / 4 -> -0.2500 or 0",
    "returned_loss: ℓ without its graph =  -> 0.7000",
  ]);
});

test("a rule that does not use the constant takes it out again", () => {
  const rule = { first: "n", second: "G", uses_constant: false, formula: "n·G" };
  assert.deepEqual(lines(stagesAhead({ ...EXAMPLE, constant: 2, rule })).slice(1, 5), [
    "masked_sum: Σ m·log p / c = -2.8000 / 2 -> -1.4000",
    "loss: -c·S / n = -(2 · -1.4000) / 7 -> 0.4000",
    "scaled_loss: L / G = 0.4000 / 2 -> 0.2000",
    "backward: -m / (n·G) = -m / 14 -> -0.0714 or 0",
  ]);
});

test("a mask of zeros is no loss, no gradient, and no minus sign", () => {
  const mask = [[0, 0, 0, 0], [0, 0, 0, 0]];
  assert.deepEqual(lines(stagesAhead({ ...EXAMPLE, mask })), [
    "num_tokens: Σ m = 0 + 0 -> 0",
    "masked_sum: Σ m·log p / c = 0 / 1 -> 0.0000",
    "loss: -S / G = -(0) / 2 -> 0.0000",
    "scaled_loss: L / G = 0 / 2 -> 0.0000",
    "backward: -m / (c·G²) = -m / 4 -> 0.0000 or 0",
    "returned_loss: ℓ without its graph =  -> 0.0000",
  ]);
});

test("float32 is what is printed: ten tenths are 1 there", () => {
  const log_probs = [Array(10).fill(Math.fround(-0.1))];
  const { masked_sum, loss } = stagesAhead({ ...EXAMPLE, log_probs, mask: [Array(10).fill(1)], constant: 0.1 });
  assert.equal(masked_sum.numeric, "-1 / 0.1000");
  assert.equal(loss.numeric, "-(-10) / 2");
});

test("many sequences are counted, not listed", () => {
  const nine = (row) => Array.from({ length: 9 }, () => row);
  const stages = stagesAhead({ ...EXAMPLE, log_probs: nine([-1]), mask: nine([1]) });
  assert.equal(stages.num_tokens.numeric, "over 9 sequences");
});

test("what is unknown here is left to the kernel", () => {
  assert.equal(stagesAhead({ ...EXAMPLE, rule: undefined }), null);
  assert.equal(stagesAhead({ ...EXAMPLE, rule: { ...NOTES, second: "ranks" } }), null);
  assert.equal(stagesAhead({ ...EXAMPLE, constant: 0 }), null);
  assert.equal(stagesAhead({ ...EXAMPLE, constant: 1e-50 }), null);
});

test("numbers are printed as Python prints them", () => {
  const printed = {
    "0.0000": [0, -0],
    "-0.2500": [-0.25],
    "0.0312": [1 / 32], // exactly halfway: the even digit
    "0.0938": [3 / 32],
    "-0.1562": [-5 / 32],
    "0.1235": [0.12345], // a little more than halfway
    "1000.0000": [1000],
    "999999.9375": [999999.9375],
    "1.000e+06": [1e6, 1000500],
    "1.002e+06": [1001500],
    "9.766e-04": [1 / 1024],
    "-9.766e-06": [-1 / 102400],
    "1.000e-10": [1e-10],
    "0.0010": [0.001],
    "1.235e+120": [1.2345678e120],
  };
  for (const [text, numbers] of Object.entries(printed)) {
    for (const number of numbers) assert.equal(fixed(number), text);
  }
  assert.deepEqual([7, -28, -0, 2.5, 1e6].map(compact), ["7", "-28", "0", "2.5000", "1.000e+06"]);
});
