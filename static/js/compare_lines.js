// How the lines of several runs are drawn into one chart: each in its run's colour and dashes.
import { dot, inPlot, lonePlaces, places, strokeColumns } from "./overlays.js";

const FAINT = 0.28;
const PUSHED_BACK = 0.2;
const BAND = 0.14;
const VALIDATION_DASH = [3, 3];
// Dots of a validation loss that are closer than this would run into one.
const MIN_DOT_DISTANCE = 9;

// `entry` has the view and its run's look; `emphasis` is 1 for the run that is pointed at, -1 beside it, else 0.
export function drawEntry(u, entry, { isSmooth, emphasis }) {
  const { ctx } = u;
  const { view, look, isValidation } = entry;
  const alpha = emphasis < 0 ? PUSHED_BACK : 1;
  ctx.save();
  if (emphasis > 0 && !isValidation) drawBand(u, view, look.color);
  if (isValidation) {
    ctx.globalAlpha = alpha;
    drawValidation(u, view, look.color);
  } else if (isSmooth) {
    ctx.globalAlpha = alpha * FAINT;
    drawLine(u, view.x, view.mean, { color: look.color, width: 1, dash: [] });
    ctx.globalAlpha = alpha;
    drawLine(u, view.x, view.smooth, { ...look, width: 1.8 + Math.max(emphasis, 0) });
  } else {
    ctx.globalAlpha = alpha;
    drawLine(u, view.x, view.mean, { ...look, width: 1.6 + Math.max(emphasis, 0) });
  }
  ctx.restore();
}

// A line has gaps, and a value between two gaps is a dot.
function drawLine(u, xs, values, { color, width, dash }) {
  inPlot(u, (ctx) => {
    setStyle(ctx, color, width, dash);
    strokeColumns(u, ctx, xs, values);
    for (const [x, y] of lonePlaces(u, { x: xs, mean: values })) dot(ctx, x, y, 2);
  });
}

function drawValidation(u, { x, mean }, color) {
  inPlot(u, (ctx) => {
    setStyle(ctx, color, 1.3, VALIDATION_DASH);
    strokeColumns(u, ctx, x, mean);
    let last = -Infinity;
    for (const [left, top] of places(u, x, mean)) {
      if (left - last < MIN_DOT_DISTANCE * devicePixelRatio) continue;
      dot(ctx, left, top, 3);
      last = left;
    }
  });
}

// Between the lowest and the highest value of each bucket.
function drawBand(u, { width, x, low, high }, color) {
  if (width <= 1) return;
  inPlot(u, (ctx) => {
    ctx.globalAlpha = BAND;
    ctx.fillStyle = color;
    const shown = [...x.keys()].filter((index) => low[index] !== null && (u.scales.y.distr !== 3 || low[index] > 0));
    ctx.beginPath();
    for (const index of shown) ctx.lineTo(u.valToPos(x[index], "x", true), u.valToPos(high[index], "y", true));
    for (const index of shown.reverse()) ctx.lineTo(u.valToPos(x[index], "x", true), u.valToPos(low[index], "y", true));
    ctx.fill();
  });
}

function setStyle(ctx, color, width, dash) {
  ctx.strokeStyle = color;
  ctx.fillStyle = color;
  ctx.lineWidth = width * devicePixelRatio;
  ctx.setLineDash(dash.map((length) => length * devicePixelRatio));
}
