// What the page that compares runs shows, as its address and the tools above the charts have it.
import { keptWeight } from "./smoothing.js";

const WEIGHT = 0.6;
const AXES = ["step", "tokens", "time"];

// The view that the hash of an address asks for; `hidden` has the places of runs.
export function viewOf(hash) {
  const view = new URLSearchParams(hash.slice(1));
  const axis = view.get("axis");
  const weight = Number.parseFloat(view.get("weight"));
  const zoom = (view.get("zoom") ?? "").split(",").map(Number);
  return {
    options: {
      axis: AXES.includes(axis) ? axis : AXES[0],
      isLog: view.has("log"),
      hasValidation: view.get("validation") !== "0",
      weight: weight >= 0 && weight < 1 ? weight : keptWeight(WEIGHT),
    },
    hidden: (view.get("hidden") ?? "").split(".").map((number) => Number(number) - 1),
    zoom: zoom.length === 2 && zoom.every(Number.isFinite) && zoom[0] < zoom[1] ? zoom : null,
  };
}

// The weight is always said: whoever is given the address may have chosen another.
export function hashOf({ axis, isLog, hasValidation, weight }, hidden, zoom) {
  const view = new URLSearchParams();
  if (axis !== AXES[0]) view.set("axis", axis);
  if (isLog) view.set("log", "1");
  if (!hasValidation) view.set("validation", "0");
  view.set("weight", weight);
  if (hidden.length) view.set("hidden", hidden.map((place) => place + 1).join("."));
  if (zoom) view.set("zoom", zoom.map((value) => Number(value.toPrecision(12))).join(","));
  return `#${view}`;
}

export function showTools({ elements }, { axis, isLog, hasValidation, weight }) {
  elements.axis.value = axis;
  elements.isLog.checked = isLog;
  elements.hasValidation.checked = hasValidation;
  elements.weight.value = weight;
  elements.weightText.value = weight.toFixed(2);
}
