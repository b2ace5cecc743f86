// Run by `node --test tests/js/inputs_ahead.test.mjs`; pytest does so too, see tests/test_step_ahead.py.
import assert from "node:assert/strict";
import { readFile } from "node:fs/promises";
import { test } from "node:test";

const source = await readFile(new URL("../../sft_edu/widgets/inputs_ahead.js", import.meta.url), "utf8");
const { Inputs, followControls } = await import(`data:text/javascript,${encodeURIComponent(source)}`);

// G as the controls show it, and whether the kernel's numbers are for it, after a hand ("3"), answers ("a3") and what
// the kernel writes into the control ("3" too).
function follow(events, answered = { G: 2, mask: "11" }) {
  const inputs = new Inputs(answered);
  return events.split(" ").map((event) => {
    if (event.startsWith("a")) inputs.answer({ ...answered, G: Number(event.slice(1)) });
    else inputs.show("G", Number(event));
    return `${inputs.now.G}${inputs.areAnswered ? "" : "?"}`;
  }).join(" ");
}

test("a value is a guess until its answer comes", () => {
  assert.equal(follow("3 a3"), "3? 3");
  assert.equal(follow("3 3 a3 a3"), "3? 3? 3 3");
});

test("an answer to what the hand has left behind changes nothing", () => {
  assert.equal(follow("3 4 5 a3 a4 a5"), "3? 4? 5? 5? 5? 5");
  assert.equal(follow("3 4 5 a3 a5"), "3? 4? 5? 5? 5", "the page sends the newest value only");
  assert.equal(follow("3 4 a3 5 a4 a5"), "3? 4? 4? 5? 5? 5");
});

test("a hand that comes back is at an answered value, and the way there stays overtaken", () => {
  assert.equal(follow("3 2 a3 a2"), "3? 2 2? 2");
});

test("a value nobody has shown is the kernel's own, and its control follows", () => {
  assert.equal(follow("a9 9"), "9 9");
  assert.equal(follow("3 a9 9"), "3? 9 9");
  assert.equal(follow("3 2"), "3? 2", "a control that goes back, because the kernel refused");
});

test("inputs are told apart: an answer may be new for one and overtaken for another", () => {
  const inputs = new Inputs({ G: 2, mask: "11" });
  inputs.show("G", 3);
  inputs.show("G", 4);
  inputs.show("mask", "10");
  inputs.answer({ G: 3, mask: "10" });
  assert.deepEqual(inputs.now, { G: 4, mask: "10" });
  assert.equal(inputs.areAnswered, false);
  inputs.answer({ G: 4, mask: "10" });
  assert.equal(inputs.areAnswered, true);
});

test("rows are compared by what is in them", () => {
  const inputs = new Inputs({ mask: [[1, 0]] });
  assert.equal(inputs.show("mask", [[1, 0]]), false);
  assert.equal(inputs.show("mask", [[1, 1]]), true);
});

test("random hands and kernels: what is shown never goes back, and the last answer is for what is shown", () => {
  let seed = 7;
  const random = (below) => (seed = (seed * 48271) % 2147483647) % below;
  for (let round = 0; round < 500; round++) {
    const inputs = new Inputs({ G: 0 });
    const sent = [0]; // values the kernel gets to see, in order
    let answered = 0;
    let shown = 0;
    for (let event = 0; event < 40; event++) {
      if (random(3)) {
        inputs.show("G", (shown = random(6)));
        if (random(2)) sent.push(shown);
      } else if (answered < sent.length - 1) {
        inputs.answer({ G: sent[++answered] });
      }
      assert.equal(inputs.now.G, shown);
    }
    for (const value of [...sent.slice(answered + 1), shown]) inputs.answer({ G: value });
    assert.ok(inputs.areAnswered);
  }
});

// --- controls ---

class Control {
  constructor(state) {
    this.state = state;
    this.listeners = [];
  }

  get(name) {
    return this.state[name];
  }

  set(state) {
    Object.assign(this.state, state);
    for (const listener of this.listeners) listener();
  }

  on(event, listener) {
    assert.equal(event, "change");
    this.listeners.push(listener);
  }

  off(event, listener) {
    this.listeners = this.listeners.filter((one) => one !== listener);
  }
}

function lab() {
  const controls = {
    steps: new Control({ value: 2 }),
    constant: new Control({ value: 1 }),
    rule: new Control({ _options_labels: ["notes", "mean"], index: 0 }),
    mask: new Control({ mask: "10 11" }),
    log_prob: new Control({ token: [0, 0], value: -0.5, min: -10, max: 0, step: 0.1 }),
  };
  const answered = {
    steps: 2,
    constant: 1,
    rule: "notes",
    mask: [[1, 0], [1, 1]],
    log_probs: [[-0.5, Math.fround(-0.1234)], [-12, -1]],
  };
  const references = Object.fromEntries(Object.keys(controls).map((name) => [name, `IPY_MODEL_${name}`]));
  const manager = { get_model: async (id) => controls[id] ?? Promise.reject(new Error("widget model not found")) };
  return { controls, references, manager, inputs: new Inputs(answered) };
}
const settled = () => new Promise((done) => setTimeout(done));

test("every control is heard in the task in which it changes", async () => {
  const { controls, references, manager, inputs } = lab();
  let news = 0;
  followControls(manager, references, inputs, () => news++);
  await settled();
  assert.equal(news, 0, "they show what the kernel has answered");
  controls.steps.set({ value: 7 });
  controls.constant.set({ value: 2.5 });
  controls.rule.set({ index: 1 });
  controls.mask.set({ mask: "01 11" });
  controls.log_prob.set({ value: -0.6 });
  controls.log_prob.set({ tooltip: "other" });
  assert.equal(news, 5);
  assert.deepEqual(inputs.now, {
    steps: 7,
    constant: 2.5,
    rule: "mean",
    mask: [[0, 1], [1, 1]],
    log_probs: [[Math.fround(-0.6), Math.fround(-0.1234)], [-12, -1]],
  });
});

test("a slider that turns to another token has not been moved", async () => {
  const { controls, references, manager, inputs } = lab();
  followControls(manager, references, inputs, () => {});
  await settled();
  controls.log_prob.set({ token: [0, 1], value: -0.1 }); // it stands on whole steps
  controls.log_prob.set({ value: -0.09999999999999964 }); // as the page writes it
  controls.log_prob.set({ token: [1, 0], value: -10 }); // it ends there
  assert.equal(inputs.areAnswered, true);
  controls.log_prob.set({ value: -9.9 });
  assert.equal(inputs.now.log_probs[1][0], Math.fround(-9.9));
});

test("a control that moved before anybody listened is heard too", async () => {
  const { controls, references, manager, inputs } = lab();
  controls.steps.set({ value: 5 });
  let news = 0;
  followControls(manager, references, inputs, () => news++);
  await settled();
  assert.deepEqual([news, inputs.now.steps], [1, 5]);
});

test("nobody listens after the end, not even to a control that was late", async () => {
  const { controls, references, manager, inputs } = lab();
  const listeners = () => Object.values(controls).reduce((sum, control) => sum + control.listeners.length, 0);
  const end = followControls(manager, references, inputs, () => assert.fail());
  await settled();
  assert.equal(listeners(), 5);
  end();
  assert.equal(listeners(), 0);
  followControls(manager, references, inputs, () => assert.fail())();
  await settled();
  assert.equal(listeners(), 0);
});

test("a control that is closed leaves its input to the kernel", async () => {
  const { controls, references, manager, inputs } = lab();
  delete controls.rule;
  followControls(manager, references, inputs, () => {});
  await settled();
  controls.steps.set({ value: 3 });
  assert.deepEqual([inputs.now.steps, inputs.now.rule], [3, "notes"]);
});
