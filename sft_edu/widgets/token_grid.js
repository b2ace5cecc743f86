// The thinking part of TokenMask: where chips lie, what a stroke does, how it is undone. Knows neither page nor kernel.
//
// A chip is known by its index in reading order: row * length + column. A mask is a Uint8Array over these indices.

// --- masks as text: one digit for each token, a space between rows, as in the widget's repr ---

export function maskFromText(text) {
  return Uint8Array.from(text.replaceAll(" ", ""), Number);
}

export function maskToText(mask, length) {
  const digits = mask.join("");
  const rows = [];
  for (let start = 0; start < digits.length; start += length) rows.push(digits.slice(start, start + length));
  return rows.join(" ");
}

// --- where chips lie ---

const LONG = 48; // from here on chips are smaller
export const GUTTER = 38; // pixels for the row numbers

// Rows wrap like text. A sideways scroll would hide most of a long sequence, and the finger that paints along a row
// could not also push it. All rows have the same length, so each has the same number of lines, and columns align.
export function makeLayout(rows, length, width, longestFace) {
  const compact = length > LONG;
  const letter = compact ? 6.6 : 7.2; // monospace at the font sizes of token_mask.css
  const fitting = Math.ceil(longestFace * letter) + (compact ? 4 : 8);
  const chipWidth = Math.min(Math.max(fitting, compact ? 22 : 32), compact ? 46 : 72);
  const chipHeight = compact ? 22 : 30;
  const gap = 2;
  const fit = Math.floor((width - GUTTER + gap) / (chipWidth + gap));
  const columns = fit >= length ? length : evenColumns(length, Math.max(fit, 1));
  const lines = Math.ceil(length / columns);
  const rowGap = lines > 1 ? 8 : 2;
  const linePitch = chipHeight + gap;
  const rowPitch = lines * linePitch - gap + rowGap;
  const chipPitch = chipWidth + gap;
  return { rows, length, columns, lines, compact, chipWidth, chipHeight, gap, rowGap, chipPitch, linePitch, rowPitch };
}

// As few lines as fit, about equally long, and where possible a multiple of 4: easy to count from.
function evenColumns(length, fit) {
  const even = Math.ceil(length / Math.ceil(length / fit));
  const round = Math.ceil(even / 4) * 4;
  return round <= fit ? round : even;
}

// The chip at a point, counted from the upper left corner of the grid, or -1. A gap belongs to the chip before it.
export function chipAt(layout, x, y) {
  const column = Math.floor((x - GUTTER) / layout.chipPitch);
  const row = Math.floor(y / layout.rowPitch);
  const line = Math.floor((y - row * layout.rowPitch) / layout.linePitch);
  const position = line * layout.columns + column;
  const inside = column >= 0 && column < layout.columns && row >= 0 && row < layout.rows;
  return inside && line < layout.lines && position < layout.length ? row * layout.length + position : -1;
}

// The chips under the line between two points. The mouse reports where it is, not where it has been.
export function chipsAlong(layout, from, to) {
  const [across, down] = [to[0] - from[0], to[1] - from[1]];
  const steps = Math.ceil(4 * Math.max(Math.abs(across) / layout.chipPitch, Math.abs(down) / layout.linePitch)) || 1;
  const crossed = new Set();
  for (let step = 0; step <= steps; step++) {
    crossed.add(chipAt(layout, from[0] + (across * step) / steps, from[1] + (down * step) / steps));
  }
  crossed.delete(-1);
  return [...crossed];
}

// Where a key leads from a chip, or -1 if it is no key of ours. Up and down follow the lines one sees.
export function keyTarget(layout, index, key) {
  const { rows, length, columns, lines } = layout;
  const row = Math.floor(index / length);
  const position = index % length;
  if (key === "Home") return row * length;
  if (key === "End") return row * length + length - 1;
  if (key === "ArrowLeft") return position > 0 ? index - 1 : index;
  if (key === "ArrowRight") return position < length - 1 ? index + 1 : index;
  if (key !== "ArrowUp" && key !== "ArrowDown") return -1;
  const line = row * lines + Math.floor(position / columns) + (key === "ArrowDown" ? 1 : -1);
  if (line < 0 || line >= rows * lines) return index;
  const below = (line % lines) * columns + (position % columns);
  return Math.floor(line / lines) * length + Math.min(below, length - 1);
}

// A range in reading order, as text is selected: to the end of the row, through the rows between, to the other end.
export function rangeOf(from, to) {
  const first = Math.min(from, to);
  return Array.from({ length: Math.abs(from - to) + 1 }, (_, step) => first + step);
}

// --- what a stroke does ---

const REMEMBERED = 200; // strokes

// A mask with strokes. Whatever changes the mask returns the indices that changed, for the page to draw.
//
// A stroke remembers its own chips only. Undoing it gives these the state they had before it, and leaves every other
// chip as it is now, whoever changed it since: another view, or the kernel. A stroke that would undo nothing is skipped.
export class Painter {
  constructor(mask) {
    this.mask = mask;
    this.unsent = new Set(); // chips the kernel has not been told about
    this.stroke = null; // index -> state before it
    this.done = [];
    this.undone = [];
  }

  begin() {
    this.end();
    this.stroke = new Map();
  }

  // Adds chips to the stroke.
  paint(indices, state) {
    for (const index of indices) {
      if (!this.stroke.has(index)) this.stroke.set(index, this.mask[index]);
    }
    return this.#set(indices.map((index) => [index, state]));
  }

  // Makes these the only chips of the stroke: a range that shrinks gives back what it leaves.
  paintOnly(indices, state) {
    const kept = new Set(indices);
    const left = [...this.stroke].filter(([index]) => !kept.has(index));
    for (const [index] of left) this.stroke.delete(index);
    const restored = this.#set(left);
    return restored.concat(this.paint(indices, state));
  }

  // Ends the stroke. Returns how many chips it changed.
  end() {
    const cells = [...(this.stroke ?? [])]
      .map(([index, before]) => [index, before, this.mask[index]])
      .filter(([, before, after]) => before !== after);
    this.stroke = null;
    if (cells.length) {
      this.done.push(cells);
      this.done.splice(0, this.done.length - REMEMBERED);
      this.undone = [];
    }
    return cells.length;
  }

  // Ends the stroke as if it had not been.
  cancel() {
    const changed = this.#set([...(this.stroke ?? [])]);
    this.stroke = null;
    return changed;
  }

  undo() {
    return this.#travel(this.done, this.undone, 1);
  }

  redo() {
    return this.#travel(this.undone, this.done, 2);
  }

  // Takes the kernel's mask. Only chips under the finger, and those the kernel has yet to hear of, stay as painted.
  adopt(mask) {
    const ours = (index) => this.unsent.has(index) || this.stroke?.has(index);
    const changed = [];
    mask.forEach((state, index) => {
      if (this.mask[index] === state || ours(index)) return;
      this.mask[index] = state;
      changed.push(index);
    });
    return changed;
  }

  #travel(from, to, side) {
    this.end();
    while (from.length) {
      const cells = from.pop();
      to.push(cells);
      const changed = this.#set(cells.map((cell) => [cell[0], cell[side]]));
      if (changed.length) return changed;
    }
    return [];
  }

  #set(cells) {
    const changed = cells.filter(([index, state]) => this.mask[index] !== state);
    for (const [index, state] of changed) {
      this.mask[index] = state;
      this.unsent.add(index);
    }
    return changed.map(([index]) => index);
  }
}

// --- words ---

// What stands on a chip. The shape of the chip says that it is an end or padding.
export function face(token, role) {
  return role === "padding" ? "·" : role === "eos" ? token.replace(/^<(.+)>$/, "$1") : token;
}

export function formatValue(value) {
  if (!Number.isFinite(value)) return String(value).replace("Infinity", "inf");
  if (value === 0) return "0";
  const size = Math.abs(value);
  return size < 1e-4 || size >= 1e6 ? value.toExponential(2) : value.toFixed(4);
}

export function describe(row, position, { token, role, state, valueName, value, note }) {
  const parts = [token, role, `mask ${state}`];
  if (value !== undefined) parts.push(`${valueName} ${formatValue(value)}`);
  if (note) parts.push(note);
  return `sequence ${row}, token ${position}: ${parts.join(", ")}`;
}

export function countTokens(count) {
  return `${count} ${count === 1 ? "token" : "tokens"}`;
}

// --- the colours of plots.gradient_colour ---

const PUOR = [
  [127, 59, 8],
  [179, 88, 6],
  [224, 130, 20],
  [253, 184, 99],
  [254, 224, 182],
  [247, 247, 247],
  [216, 218, 235],
  [178, 171, 210],
  [128, 115, 172],
  [84, 39, 136],
  [45, 0, 75],
];
const LINEAR = 1e-4; // below it the scale is linear, above it logarithmic
const STEPS = 256; // matplotlib draws a map in so many colours

function symmetricLog(size) {
  return size <= LINEAR ? size / 0.9 : LINEAR * (1 / 0.9 + Math.log10(size / LINEAR));
}

// [red, green, blue] of 0 to 255: white for exactly 0, orange below, purple above. null for what is not a number.
export function gradientColour(value) {
  if (Number.isNaN(value)) return null;
  if (value === 0) return [255, 255, 255];
  const depth = symmetricLog(Math.min(Math.abs(value), 1)) / symmetricLog(1);
  const step = Math.floor((0.5 + 0.32 * Math.sign(value) * depth) * STEPS);
  const place = (step / (STEPS - 1)) * (PUOR.length - 1);
  const [low, high] = [PUOR[Math.floor(place)], PUOR[Math.ceil(place)]];
  return low.map((channel, i) => Math.round(channel + (high[i] - channel) * (place % 1)));
}

// The ink for a shade: black or white, whichever can be read better. The ends of the map are too dark for black.
export function inkOn(rgb) {
  const [red, green, blue] = rgb.map((channel) =>
    channel <= 10 ? channel / 3294.6 : ((channel / 255 + 0.055) / 1.055) ** 2.4,
  );
  return 0.2126 * red + 0.7152 * green + 0.0722 * blue > 0.179 ? [0, 0, 0] : [255, 255, 255];
}
