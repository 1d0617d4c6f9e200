// A chart as a table, the newest step first, for whoever reads numbers rather than lines.
import { rowOf } from "./chart_parts.js";
import { count, decimal } from "./format.js";
import { valueBefore } from "./overlays.js";
import { lowerBound } from "./series.js";

const MAX_ROWS = 300;

export function tableOf(view, overlays) {
  const isBucketed = view.width > 0;
  const others = overlays.map(({ label }) => label);
  const heads = ["Step", isBucketed ? "Mean" : "Value", "Smoothed", ...(isBucketed ? ["Lowest", "Highest", "Values"] : []), ...others];
  const table = document.createElement("table");
  table.className = "table";
  table.createTHead().append(rowOf("th", heads));
  const body = table.createTBody();
  for (let index = view.x.length - 1; index >= 0 && view.x.length - index <= MAX_ROWS; index -= 1) {
    const value = view.mean[index] === null ? "not finite" : decimal(view.mean[index]);
    const range = isBucketed ? [decimal(view.low[index]), decimal(view.high[index]), count(view.numValues[index])] : [];
    body.append(rowOf("td", [count(view.step[index]), value, decimal(view.smooth[index]), ...range, ...measuredAt(view, index, overlays)]));
  }
  return table;
}

// The other series' values at the step of a row, or in its bucket.
function measuredAt(view, index, overlays) {
  const end = view.step[index + 1] ?? Infinity;
  return overlays.map(({ series, view: other }) => {
    const found = valueBefore(series, end - 1);
    if (found && found[0] >= view.step[index]) return decimal(found[1]);
    const place = lowerBound(other.step, view.step[index]);
    return other.step[place] < end && other.mean[place] === null ? "not finite" : "";
  });
}
