// The two axes of a chart as uPlot takes them.
import { niceTicks, tickStep } from "./axes.js";
import { tick } from "./format.js";

// Steps are whole numbers, and so are their labels.
export const WHOLE = [1, 2, 5].flatMap((digit) => Array.from({ length: 10 }, (_, power) => digit * 10 ** power)).sort((a, b) => a - b);

// `labels` says where ticks may be and what stands at them.
export function xAxis(colors, labels) {
  return { ...plain(colors), size: 26, space: 56, ...labels };
}

export function yAxis(colors, isLog) {
  return {
    ...plain(colors),
    size: 54,
    space: 34,
    splits: (u, index, min, max) => niceTicks(min, max, isLog),
    filter: (u, ticks) => ticks,
    values: (u, ticks) => ticks.map((value, index) => tick(value, tickStep(ticks, index))),
  };
}

function plain(colors) {
  return {
    stroke: colors.axis,
    grid: { stroke: colors.grid, width: 1 },
    ticks: { show: false },
    font: `11px ${colors.font}`,
    gap: 6,
  };
}

export function padded(from, to) {
  return from === to ? { min: from - 1, max: to + 1 } : { min: from, max: to };
}
