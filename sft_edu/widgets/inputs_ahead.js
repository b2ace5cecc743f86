// The inputs as the controls show them, and which of them the kernel has answered. Knows no page: models only.
//
// A hand is faster than the kernel. While it goes on, answers to what it has left behind still arrive, and a number
// drawn from one of them would jump back. So each input keeps the values it has shown since the one answered last. An
// answer with one of these values is about that moment; one with any other value is the kernel's own will, and the
// control is about to follow it.

export class Inputs {
  constructor(answered) {
    this.trails = {};
    this.answer(answered);
  }

  // A control shows a value. Returns whether that is news.
  show(name, value) {
    const trail = this.trails[name];
    if (same(trail.at(-1), value)) return false;
    trail.push(value);
    return true;
  }

  // The kernel has answered these values, by name. To hear the same answer again changes nothing.
  answer(values) {
    for (const [name, value] of Object.entries(values)) {
      const trail = this.trails[name] ?? [];
      const place = trail.findIndex((one) => same(one, value));
      this.trails[name] = place < 0 ? [value] : trail.slice(place);
    }
  }

  get now() {
    return Object.fromEntries(Object.entries(this.trails).map(([name, trail]) => [name, trail.at(-1)]));
  }

  // Whether the last answer is about what the controls show now.
  get areAnswered() {
    return Object.values(this.trails).every((trail) => same(trail[0], trail.at(-1)));
  }
}

function same(one, other) {
  return JSON.stringify(one) === JSON.stringify(other);
}

// What the model of a control says, as the kernel writes it in its answers.
const READ = {
  steps: (control) => ["steps", control.get("value")],
  constant: (control) => ["constant", control.get("value")],
  rule: (control) => ["rule", control.get("_options_labels")[control.get("index")]],
  mask: (control) => ["mask", control.get("mask").split(" ").map((row) => Array.from(row, Number))],
  // The slider of one token among all log-probs. It stands on whole steps, its token perhaps between two of them.
  log_prob(control, { log_probs: logProbs }) {
    const [row, column] = control.get("token");
    const [low, high, step, value] = ["min", "max", "step", "value"].map((name) => control.get(name));
    const place = (number) => Math.round(Math.min(Math.max(number, low), high) / step);
    if (place(logProbs[row][column]) === place(value)) return ["log_probs", logProbs];
    const moved = logProbs.map((values) => [...values]);
    moved[row][column] = Math.fround(value);
    return ["log_probs", moved];
  },
};

// Keeps inputs up to date with the models of controls, given as references by name. `onNews` is called in the task in
// which a control changes. Returns what ends it.
export function followControls(manager, controls, inputs, onNews) {
  const endings = [];
  let ended = false;

  function follow(name, control) {
    if (ended) return;
    const hear = () => inputs.show(...READ[name](control, inputs.now)) && onNews();
    control.on("change", hear);
    endings.push(() => control.off("change", hear));
    hear(); // it may have moved before anybody listened
  }

  for (const [name, reference] of Object.entries(controls)) {
    const closed = () => {}; // then its input stays as the kernel has it
    manager.get_model(reference.replace("IPY_MODEL_", "")).then((control) => follow(name, control), closed);
  }
  return () => {
    ended = true;
    for (const end of endings) end();
  };
}
