// The x axes that runs share: their steps, the tokens they have seen, the time since each began.
import { count } from "./format.js";
import { WHOLE } from "./plot_axes.js";

const UNITS = [[86_400, "d"], [3_600, "h"], [60, "min"], [1, "s"]];
const ELAPSED_STEPS = [
  0.1, 0.2, 0.5, 1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1_800, 3_600, 7_200, 10_800, 21_600, 43_200,
  86_400, 172_800, 432_000, 864_000, 1_728_000, 4_320_000, 8_640_000,
];
// From where on numbers are said in a unit, its size and sign.
const SHORT = [[1e9, 1e9, "G"], [1e6, 1e6, "M"], [1e4, 1e3, "k"]];

// Names and labels of the axes, and the words for a place on them.
export const RUN_AXES = {
  step: { title: "step", incrs: WHOLE, label: count, wordsAt: (x) => `step ${count(x)}` },
  tokens: { title: "tokens", incrs: WHOLE, label: short, wordsAt: (x) => `${count(x)} tokens` },
  time: { title: "time since the start", incrs: ELAPSED_STEPS, label: elapsed, wordsAt: (x) => `${elapsed(x)} after the start` },
};

// The two largest units that are not 0: "2 h 30 min", "5 min".
export function elapsed(seconds) {
  if (seconds < 0) return `-${elapsed(-seconds)}`;
  if (seconds < 10) return `${Number(seconds.toFixed(1))} s`;
  let rest = Math.round(seconds);
  const parts = [];
  for (const [length, unit] of UNITS) {
    const number = Math.floor(rest / length);
    rest -= number * length;
    if (number) parts.push(`${number} ${unit}`);
    else if (parts.length) break;
    if (parts.length === 2) break;
  }
  return parts.join(" ");
}

function short(value) {
  const [, size, sign] = SHORT.find(([from]) => Math.abs(value) >= from) ?? [];
  return size ? `${Number((value / size).toPrecision(6))}${sign}` : count(value);
}
