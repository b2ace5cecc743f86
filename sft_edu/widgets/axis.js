// Axes: where a value stands, which round numbers are marked, and how they are written.

const TICKS = 12; // at most

// Where a value stands on the axis: 0 at its low end, 1 at its high end, below or above these beyond it.
export function place(value, [low, high], log) {
  return log ? Math.log(value / low) / Math.log(high / low) : (value - low) / (high - low);
}

// Round numbers on the axis: about so many of them, or the powers of ten.
export function ticksOf([low, high], log, wanted = 5) {
  const slack = 1e-9;
  if (log) {
    const decades = Math.log10(high / low);
    const stride = Math.ceil(decades / 8);
    const [first, last] = [Math.floor(Math.log10(low)), Math.ceil(Math.log10(high))];
    const found = [];
    for (let power = first; power <= last; power += stride) {
      for (const digit of decades < 2.5 ? [1, 2, 5] : [1]) found.push(digit * 10 ** power);
    }
    return found.filter((tick) => tick >= low * (1 - slack) && tick <= high * (1 + slack)).slice(0, TICKS);
  }
  const rough = (high - low) / wanted;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].find((factor) => factor * power >= rough * (1 - slack)) * power;
  const found = [];
  for (let index = Math.ceil(low / step - slack); index * step <= high + slack * step; index++) found.push(index * step);
  return found.slice(0, TICKS);
}

export function tickText(tick) {
  const size = Math.abs(tick);
  return size !== 0 && (size < 1e-3 || size >= 1e5) ? tick.toExponential().replace("+", "") : String(+tick.toPrecision(6));
}
