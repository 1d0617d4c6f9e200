// The colours of charts, in the theme in force.
const CHART_COLORS = [
  "line", "raw", "band", "abandoned", "ancestor", "ancestor-overlay", "grid", "axis", "bad", "floor",
  "overlay-1", "overlay-2", "overlay-3", "overlay-4", "overlay-5",
];

// Canvas needs colours resolved for the theme in force.
export function readColors(element) {
  const probe = document.createElement("span");
  element.append(probe);
  const style = getComputedStyle(probe);
  const read = (name) => {
    probe.style.color = `var(--${name})`;
    return style.color;
  };
  const colors = Object.fromEntries(["surface", "text", "good", "busy", "warn", "idle", "done"].map((name) => [name, read(name)]));
  for (const name of CHART_COLORS) colors[name] = read(`chart-${name}`);
  colors.font = style.fontFamily;
  probe.remove();
  return colors;
}
