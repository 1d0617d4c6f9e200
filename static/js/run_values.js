// What the lines of a chart say, in words: each run's last and best value, or those at the crosshair.
import { count, decimal } from "./format.js";
import { upperBound } from "./series.js";

// An entry's value at a place on the axis: [value, note].
export function wordsAt(entry, x, axis, isSmooth) {
  const { run, view, series } = entry;
  const extent = series.extent(axis);
  if (!extent || x < extent[0]) return [decimal(null), ""];
  if (x > run.endOn(axis)) return [decimal(null), `${run.isOver ? "ended" : "so far"} at step ${count(run.endOn("step"))}`];
  const index = Math.max(upperBound(view.x, x) - 1, 0);
  const value = view.mean[index];
  const notes = [];
  if (isSmooth && value !== null && view.smooth[index] !== null) notes.push(`smoothed ${decimal(view.smooth[index])}`);
  if (axis !== "step" || view.step[index] + Math.max(view.width, 1) <= x) notes.push(`step ${count(view.step[index])}`);
  return [value === null ? "not finite" : decimal(value), notes.join(", ")];
}

// The last value, and the best one where the metric has a better end.
export function lastWords({ series: { facts } }, best) {
  if (facts.last === null) return [facts.numBad ? "not finite" : decimal(null), ""];
  const step = facts[`${best}Step`];
  return [decimal(facts.last), best ? `${best} ${decimal(facts[best])} ${facts.isRough ? "near" : "at"} step ${count(step)}` : ""];
}

// The place nearest to one on the axis where any of the entries has a value; null where none has.
export function nearestPlace(entries, x) {
  let nearest = null;
  for (const { view } of entries) {
    const after = upperBound(view.x, x);
    for (const place of [view.x[after - 1], view.x[after]]) {
      if (place === undefined) continue;
      if (nearest === null || Math.abs(place - x) < Math.abs(nearest - x)) nearest = place;
    }
  }
  return nearest;
}

// The next place with a value in a range, to the left (-1) or to the right (1).
export function nextPlace(entries, x, move, [from, to]) {
  const isNext = (place) => place >= from && place <= to && (move > 0 ? place > x : place < x);
  const all = entries.flatMap(({ view }) => view.x).filter(isNext);
  return all.length ? all.reduce((a, b) => ((b - a) * move < 0 ? b : a)) : null;
}

// How a chart shows what it shows.
export function summaryOf(entries, { weight }) {
  const width = Math.max(...entries.map(({ view }) => view.width), 1);
  const words = [];
  if (weight > 0) words.push(`smoothed with weight ${weight.toFixed(2)}, values as they are faint`);
  if (width > 1) words.push(`each point is the mean of up to ${count(width)} steps`);
  if (entries.some(({ isValidation }) => isValidation)) words.push("dashed with dots: validation, not smoothed");
  if (entries.some(({ line }) => line.hasLeftBehind)) words.push("what a run left behind when it went back is not drawn");
  return words.join("; ");
}

export function badWords(entries) {
  const bad = entries.filter(({ series: { facts } }) => facts.numBad > 0);
  const numBad = bad.reduce((sum, { series: { facts } }) => sum + facts.numBad, 0);
  const details = bad.map(({ run, series: { facts } }) => `${run.title}: ${count(facts.numBad)}, first ${facts.isRough ? "near" : "at"} step ${count(facts.firstBad)}`);
  return { numBad, text: `${count(numBad)} not finite`, title: details.join("\n") };
}
