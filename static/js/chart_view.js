// What the charts of a run show, as its address and the tools above them have it.
import { timeTitle } from "./format.js";
import { isIgnoring } from "./outliers.js";
import { keptWeight } from "./smoothing.js";

const WEIGHT = 0.6;
const AXES = ["step", "tokens", "time"];
const SPANS = ["all", "1000", "tenth"];
const PARTS = ["axis", "log", "outliers", "span", "weight", "zoom"];

// The view that the hash of an address asks for; null where it names a place on the page instead.
export function viewOf(hash) {
  const view = new URLSearchParams(hash.slice(1));
  if (view.size && !PARTS.some((part) => view.has(part))) return null;
  const oneOf = (choices, chosen) => (choices.includes(chosen) ? chosen : choices[0]);
  const weight = Number.parseFloat(view.get("weight"));
  const zoom = (view.get("zoom") ?? "").split(",").map(Number);
  return {
    axis: oneOf(AXES, view.get("axis")),
    isLog: view.has("log"),
    ignoresOutliers: view.has("outliers") ? view.get("outliers") !== "shown" : isIgnoring(),
    span: oneOf(SPANS, view.get("span")),
    weight: weight >= 0 && weight < 1 ? weight : keptWeight(WEIGHT),
    zoom: zoom.length === 2 && zoom.every(Number.isFinite) && zoom[0] < zoom[1] ? zoom : null,
  };
}

// The weight and the rule for outliers are always said: whoever is given the address may have chosen another.
export function hashOf({ axis, isLog, ignoresOutliers, span, weight }, zoom) {
  const view = new URLSearchParams();
  if (axis !== "step") view.set("axis", axis);
  if (isLog) view.set("log", "1");
  view.set("outliers", ignoresOutliers ? "ignored" : "shown");
  if (span !== "all") view.set("span", span);
  view.set("weight", weight);
  if (zoom) view.set("zoom", zoom.map((value) => Number(value.toPrecision(12))).join(","));
  return `#${view}`;
}

export function showTools({ elements }, options) {
  for (const name of ["weight", "axis", "span"]) elements[name].value = options[name];
  for (const name of ["isLog", "ignoresOutliers"]) elements[name].checked = options[name];
  showWeight({ elements }, options.weight);
}

export function showWeight({ elements }, weight) {
  elements.weightText.value = weight.toFixed(2);
  const halfLife = weight > 0 ? Math.log(0.5) / Math.log(weight) : 0;
  elements.weight.title = weight > 0 ? `A value counts half after ${halfLife.toFixed(1)} steps` : "No smoothing";
}

// Says the zone of the times while they are shown.
export function showZone({ elements }, axis, range) {
  elements.axis.options[AXES.indexOf("time")].textContent = axis === "time" && range ? timeTitle(...range) : "time";
}
