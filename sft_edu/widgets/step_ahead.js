// The six steps in plain arithmetic, ahead of the kernel: what trace.py and step_view.py will make of the same inputs.
// Knows neither page nor kernel.
//
// The kernel computes in float32, and so does this: `float` after each operation. Only the sum over the tokens may
// differ in its last bits, because nobody promises the order in which torch adds.

const float = Math.fround;
const PLACES = 4; // digits after the point
const LISTED = 8; // sequences whose token counts are written out

// --- numbers as digits.py prints them ---

export function fixed(value) {
  const size = Math.abs(value);
  const sign = value < 0 ? "-" : "";
  if (size === 0 || (size >= 10 ** (1 - PLACES) && size < 1e6)) return sign + halfToEven(size, "toFixed", PLACES);
  const [digits, exponent] = halfToEven(size, "toExponential", PLACES - 1).split("e");
  return `${sign}${digits}e${exponent[0]}${exponent.slice(1).padStart(2, "0")}`;
}

export function compact(value) {
  return Math.abs(value) < 1e6 && Number.isInteger(value) ? String(value + 0) : fixed(value);
}

// Where the exact value lies halfway, as 1/32 = 0.03125 does, Python takes the even digit, JavaScript the larger one.
function halfToEven(size, method, places) {
  const exact = size[method](80).match(/^(\d+\.)(\d*?)0*(e.*)?$/);
  const isHalf = exact[2].length === places + 1 && exact[2].endsWith("5");
  const isEven = Number(exact[2][places - 1]) % 2 === 0;
  return isHalf && isEven ? exact[1] + exact[2].slice(0, places) + (exact[3] ?? "") : size[method](places);
}

// --- the step ---

// Texts by the name of the stage, or null where the rule or one of its symbols is unknown here, or where a number is
// not finite: the kernel has words for that.
//
// log_probs and mask are rows of tokens; rule is one of scaling.py: the symbols that divide first and second, whether
// the constant is one of the divisors, and the formula of all of them. As in StepLab, the other microbatches of the
// minibatch hold as many tokens as this one.
export function stagesAhead({ log_probs: logProbs, mask, steps, constant, rule }) {
  const perSequence = mask.map((row) => row.filter(Boolean).length);
  const numTokens = add(perSequence);
  const n = Math.max(numTokens, 1);
  const counts = { 1: 1, c: constant, B: mask.length, G: steps, n, N: n * steps };
  const [first, second] = [counts[rule?.first], counts[rule?.second]];
  if (first === undefined || second === undefined) return null;
  const divisor = float(rule.uses_constant ? first : first / constant);

  const selected = logProbs.flatMap((row, index) => row.filter((_, position) => mask[index][position]));
  const maskedSum = float(float(add(selected)) / float(constant));
  const loss = float(-maskedSum / divisor);
  const scaled = float(loss / second);
  const gradient = numTokens ? -float(float(float(1 / second) / divisor) / float(constant)) : 0;
  if (![maskedSum, loss, scaled, gradient].every(Number.isFinite)) return null;
  const denominator = (rule.uses_constant ? constant : 1) * first * second;

  const listed = perSequence.length <= LISTED ? perSequence.join(" + ") : `over ${perSequence.length} sequences`;
  const [c, S, L] = [constant, maskedSum, loss].map(compact);
  const [sum, put] = rule.uses_constant ? ["-S", `-(${S})`] : ["-c·S", `-(${c} · ${S})`];
  const afterSlash = rule.formula.includes("·") ? `(${rule.formula})` : rule.formula;
  return {
    num_tokens: texts("Σ m", listed, compact(numTokens)),
    masked_sum: texts("Σ m·log p / c", `${compact(float(maskedSum * float(constant)))} / ${c}`, fixed(maskedSum)),
    loss: texts(`${sum} / ${rule.first}`, `${put} / ${compact(first)}`, fixed(loss)),
    scaled_loss: texts(`L / ${rule.second}`, `${L} / ${compact(second)}`, fixed(scaled)),
    backward: texts(`-m / ${afterSlash}`, `-m / ${compact(denominator)}`, `${fixed(gradient)} or 0`),
    returned_loss: texts("ℓ without its graph", "", fixed(scaled)),
  };
}

function texts(symbolic, numeric, value) {
  return { symbolic, numeric, value };
}

function add(numbers) {
  return numbers.reduce((sum, number) => sum + number, 0);
}
