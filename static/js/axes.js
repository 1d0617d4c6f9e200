// The range and the labels of a chart's y axis, and what a logarithmic one can show.
export function yRange(min, max, isLog) {
  if (min === null || max === null) return isLog ? [0.1, 1] : [0, 1];
  // Rounding in the average makes a constant vary in its last digits; such a range has no ticks.
  const isConstant = max - min <= 1e-7 * Math.max(Math.abs(min), Math.abs(max));
  if (isLog) return isConstant ? [min / 2, max * 2] : [min / (max / min) ** 0.06, max * (max / min) ** 0.06];
  const space = isConstant ? Math.abs(max) * 0.1 || 1 : (max - min) * 0.07;
  // Measures that cannot be negative do not get an axis below zero.
  return [min >= 0 ? Math.max(min - space, 0) : min - space, max + space];
}

// Columns as a logarithmic axis can show them, and the places where something is at or below its zero: there the
// band goes down to the lowest positive value in view.
export function aboveZero(x, [mean, smooth, high, low]) {
  const lowest = [mean, smooth, high, low].flat().reduce((least, value) => (value > 0 ? Math.min(least, value) : least), Infinity);
  const positive = (column) => column.map((value) => (value > 0 ? value : null));
  const bottom = low.map((value, index) => (high[index] > 0 ? Math.max(value, lowest) : null));
  const floored = x.filter((_, index) => [mean[index], low[index]].some((value) => value !== null && value <= 0));
  return { columns: [positive(mean), positive(smooth), positive(high), bottom], floored };
}

export function niceTicks(min, max, isLog) {
  if (!isLog || max / min < 8) return linearTicks(min, max);
  const digits = max / min > 1000 ? [1] : [1, 2, 5];
  const ticks = [];
  for (let power = Math.floor(Math.log10(min)); power <= Math.ceil(Math.log10(max)); power += 1) {
    for (const digit of digits) ticks.push(Number(`${digit}e${power}`));
  }
  return ticks.filter((value) => value >= min && value <= max);
}

function linearTicks(min, max) {
  const rough = (max - min) / 4;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((digit) => digit * power).find((size) => size >= rough * 0.999);
  const first = Math.ceil(min / step - 1e-9);
  const number = Math.min(Math.floor(max / step + 1e-9) - first + 1, 12);
  return Array.from({ length: Math.max(number, 0) }, (_, index) => Number(((first + index) * step).toPrecision(12)));
}

export function tickStep(ticks, index) {
  const other = index > 0 ? ticks[index - 1] : ticks[index + 1];
  return other === undefined ? ticks[index] / 100 : Math.abs(ticks[index] - other);
}
