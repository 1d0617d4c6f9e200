// Which values a y axis leaves out so that a few far ones do not flatten all others: the one rule for outliers.
//
// Of the values of a line in view, the middle eighty percent (those between the 10th and the 90th percentile) decide:
// what lies further from them than five times their own extent is an outlier. That extent counts as half the median
// at least, on a logarithmic axis as one decade, so that a warm-up before a constant is none. Fewer than eight values
// have no outliers, and neither have values that are mostly zero. A line is judged by its own values alone, and its
// smoothed form by them, too, unless nothing of that would be left. Values are never altered: a chart says how many
// points lie beyond its axis and marks where.
import { yRange } from "./axes.js";

const [FIRST, LAST] = [0.1, 0.9];
const REACH = 5;
const FEWEST = 8;
const DECADE = 1;

// The lowest and the highest value that is no outlier among some, infinite where there is no rule.
export function fencesOf(values, isLog) {
  if (values.length < FEWEST) return [-Infinity, Infinity];
  const sorted = Float64Array.from(values, (value) => (isLog ? Math.log10(value) : value)).sort();
  const end = sorted.length - 1;
  const [low, high] = [sorted[Math.ceil(FIRST * end)], sorted[Math.floor(LAST * end)]];
  const least = isLog ? DECADE : Math.abs(sorted[end >> 1]) / 2;
  const reach = REACH * Math.max(high - low, least);
  if (reach === 0) return [-Infinity, Infinity];
  return isLog ? [10 ** (low - reach), 10 ** (high + reach)] : [low - reach, high + reach];
}

// The range of an axis without outliers, and the points beyond it; null where there are none. A line has its places,
// `columns` of values at each, and perhaps a smoothed form of them.
export function beyond(lines, [from, to], isLog) {
  const isShown = (value) => value !== null && Number.isFinite(value) && !(isLog && value <= 0);
  const seen = lines.map(({ x, columns, smooth }) => {
    const at = [...x.keys()].filter((index) => x[index] >= from && x[index] <= to);
    const drawn = (column) => at.map((index) => column[index]).filter(isShown);
    return { x, at, columns, values: columns.flatMap(drawn), smooth: drawn(smooth ?? []) };
  });
  const kept = seen.flatMap(({ values, smooth }) => keptOf(values, smooth, isLog));
  const number = seen.reduce((sum, { values, smooth }) => sum + values.length + smooth.length, 0);
  if (kept.length === number) return null;
  const range = yRange(...extentOf(kept), isLog);
  const points = { above: [], below: [] };
  for (const { x, at, columns } of seen) {
    for (const index of at) {
      const values = columns.map((column) => column[index]).filter(isShown);
      const [low, high] = extentOf(values);
      if (high > range[1]) points.above.push([x[index], high]);
      if (low < range[0]) points.below.push([x[index], low]);
    }
  }
  const smooth = seen.flatMap((line) => line.smooth);
  const leaves = smooth.some((value) => value > range[1] || value < range[0]);
  return points.above.length || points.below.length || leaves ? { range, ...points, leaves } : null;
}

function keptOf(values, smooth, isLog) {
  const [low, high] = fencesOf(values, isLog);
  const isKept = (value) => value >= low && value <= high;
  const near = smooth.filter(isKept);
  return [...values.filter(isKept), ...(near.length ? near : smooth)];
}

function extentOf(values) {
  let [low, high] = [Infinity, -Infinity];
  for (const value of values) {
    low = Math.min(low, value);
    high = Math.max(high, value);
  }
  return [low, high];
}

// How many points lie beyond the axis: "3 points above, 1 below"; the smoothed line alone may, too.
export function beyondWords({ above, below }) {
  const sides = [[above, "above"], [below, "below"]].filter(([points]) => points.length);
  if (!sides.length) return "smoothed line cut off";
  return sides.map(([{ length }, side], index) => `${length}${index ? "" : length === 1 ? " point" : " points"} ${side}`).join(", ");
}

// What somebody has chosen, kept in their browser.
export function isIgnoring() {
  try {
    return localStorage.getItem("outliers") !== "shown";
  } catch {
    return true;
  }
}

export function keepIgnoring(isIgnored) {
  try {
    localStorage.setItem("outliers", isIgnored ? "ignored" : "shown");
  } catch {
    // Kept for this page only.
  }
}
