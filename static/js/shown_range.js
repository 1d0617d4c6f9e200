// The part of the x axis that all charts show, so that a crosshair means the same place in each.

// The extent of a run's own series and of others beside them, or its end; null without any value.
export function shownRange(own, others, { axis, span }) {
  let from = Infinity;
  let to = -Infinity;
  for (const series of [...own, ...others]) {
    const extent = series.extent(axis);
    if (!extent) continue;
    from = Math.min(from, extent[0]);
    to = Math.max(to, extent[1]);
  }
  if (from > to) return null;
  if (span === "tenth") return [to - (to - from) / 10, to];
  if (span === "all") return [from, to];
  const first = axis === "step" ? to - Number(span) : placeOfLast(own, axis, Number(span));
  return [Math.max(from, first), to];
}

// Where the last steps begin on an axis that does not count steps.
function placeOfLast(own, axis, numSteps) {
  const series = own.filter(({ isEmpty }) => !isEmpty);
  const first = Math.max(...series.map((one) => one.extent("step")[1])) - numSteps;
  return Math.min(...series.map((one) => one.placeOf(axis, first)));
}
