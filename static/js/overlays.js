// What the loss chart draws beside its own line: validation losses with their dots, and the runs it was forked from.
export const VALIDATION = "validation_loss";
const MAX_DOTS = 120;

// The lowest and highest value of views, so that an axis has room for them; null without any.
export function extremes(views, isLog) {
  let low = Infinity;
  let high = -Infinity;
  for (const { mean } of views) {
    for (const value of mean) {
      if (value === null || (isLog && value <= 0)) continue;
      low = Math.min(low, value);
      high = Math.max(high, value);
    }
  }
  return low > high ? null : [low, high];
}

export function drawOverlay(u, view, { color, dash }) {
  inPlot(u, (ctx) => {
    ctx.strokeStyle = color;
    ctx.fillStyle = color;
    ctx.lineWidth = 1.8 * devicePixelRatio;
    ctx.setLineDash(dash.map((length) => length * devicePixelRatio));
    strokeColumns(u, ctx, view.x, view.mean);
    ctx.setLineDash([]);
    if (view.x.length <= MAX_DOTS) for (const [x, y] of places(u, view.x, view.mean)) dot(ctx, x, y, 3);
    else for (const [x, y] of lonePlaces(u, view)) dot(ctx, x, y, 3);
  });
}

// A faint line: another run's, up to where this one took over.
export function drawFaint(u, xs, values, color, dash = []) {
  inPlot(u, (ctx) => {
    ctx.strokeStyle = color;
    ctx.lineWidth = 1.3 * devicePixelRatio;
    ctx.setLineDash(dash.map((length) => length * devicePixelRatio));
    strokeColumns(u, ctx, xs, values);
  });
}

// A ring with a word beside it.
export function drawBest(u, x, y, { color, surface, font }) {
  if (x < u.scales.x.min || x > u.scales.x.max) return;
  inPlot(u, (ctx, bbox) => {
    const [left, top] = [u.valToPos(x, "x", true), u.valToPos(y, "y", true)];
    ctx.lineWidth = 2 * devicePixelRatio;
    ctx.strokeStyle = color;
    ctx.fillStyle = surface;
    ctx.beginPath();
    ctx.arc(left, top, 6 * devicePixelRatio, 0, 2 * Math.PI);
    ctx.fill();
    ctx.stroke();
    ctx.fillStyle = color;
    dot(ctx, left, top, 2.5);
    ctx.font = `600 ${11 * devicePixelRatio}px ${font}`;
    const isAtEdge = left > bbox.left + bbox.width - 50 * devicePixelRatio;
    ctx.textAlign = isAtEdge ? "right" : "left";
    ctx.textBaseline = "bottom";
    ctx.fillText("best", left + (isAtEdge ? -9 : 9) * devicePixelRatio, top - 5 * devicePixelRatio);
  });
}

// The value at a step, or the last one before it.
export function valueBefore(series, step) {
  for (let index = series.step.length - 1; index >= 0; index -= 1) {
    if (series.step[index] <= step && Number.isFinite(series.value[index])) return [series.step[index], series.value[index]];
  }
  // The finer part of the past may begin after the step.
  for (const past of [series.history, series.whole]) {
    for (let index = (past?.step.length ?? 0) - 1; index >= 0; index -= 1) {
      if (past.step[index] <= step && past.mean[index] !== null) return [past.step[index], past.mean[index]];
    }
  }
  return null;
}

export function inPlot(u, draw) {
  const { ctx, bbox } = u;
  ctx.save();
  ctx.beginPath();
  ctx.rect(bbox.left, bbox.top, bbox.width, bbox.height);
  ctx.clip();
  draw(ctx, bbox);
  ctx.restore();
}

// A line has a gap where a value cannot be drawn.
export function strokeColumns(u, ctx, xs, values) {
  ctx.beginPath();
  let isGap = true;
  xs.forEach((x, index) => {
    const isShown = canShow(u, values[index]);
    if (isShown) ctx[isGap ? "moveTo" : "lineTo"](...placeOf(u, x, values[index]));
    isGap = !isShown;
  });
  ctx.stroke();
}

function canShow(u, value) {
  const isLog = u.scales.y.distr === 3;
  return value !== null && Number.isFinite(value) && !(isLog && value <= 0);
}

function placeOf(u, x, value) {
  return [u.valToPos(x, "x", true), u.valToPos(value, "y", true)];
}

export function places(u, xs, values) {
  const shown = [...xs.keys()].filter((index) => canShow(u, values[index]));
  return shown.map((index) => placeOf(u, xs[index], values[index]));
}

export function lonePlaces(u, { x, mean }) {
  const isAlone = (index) => (mean[index - 1] ?? null) === null && (mean[index + 1] ?? null) === null;
  const lone = mean.map((value, index) => (value !== null && isAlone(index) ? value : null));
  return places(u, x, lone);
}

export function dot(ctx, x, y, size) {
  ctx.beginPath();
  ctx.arc(x, y, size * devicePixelRatio, 0, 2 * Math.PI);
  ctx.fill();
}
