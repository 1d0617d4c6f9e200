// A chart of several runs as a table, the newest step first: a column for each line.
import { rowOf } from "./chart_parts.js";
import { count, decimal } from "./format.js";

const MAX_ROWS = 300;

export function tableOf(entries) {
  const steps = [...new Set(entries.flatMap(({ view }) => view.step))].sort((a, b) => b - a);
  const columns = entries.map(({ view }) => valuesByStep(view));
  const table = document.createElement("table");
  table.className = "table";
  table.createTHead().append(rowOf("th", ["Step", ...entries.map(({ run, isValidation }) => (isValidation ? `${run.title}, validation` : run.title))]));
  const body = table.createTBody();
  for (const step of steps.slice(0, MAX_ROWS)) body.append(rowOf("td", [count(step), ...columns.map((column) => column.get(step) ?? "")]));
  table.createCaption().textContent = captionOf(entries, steps.length);
  return table;
}

function valuesByStep({ step, mean }) {
  return new Map(step.map((number, index) => [number, mean[index] === null ? "not finite" : decimal(mean[index])]));
}

function captionOf(entries, numSteps) {
  const width = Math.max(...entries.map(({ view }) => view.width), 1);
  const words = width > 1 ? `Means of up to ${count(width)} steps` : "Every value";
  return numSteps > MAX_ROWS ? `${words}; the newest ${MAX_ROWS} of ${count(numSteps)} rows` : words;
}
