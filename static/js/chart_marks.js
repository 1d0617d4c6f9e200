// What a chart marks beside its lines: events as verticals, the loud ones with a flag, and values that are no numbers.

// Shapes, not colours alone: a ring for a run that came back whole, a filled square for one that did not.
const FLAGS = { recovered: drawRing, diverged: drawSquare };

export function drawEvents(u, events, pointed, { colors, placeOf }) {
  for (const event of events) {
    if (event.isQuiet && event !== pointed) continue;
    const color = colors[event.tone] ?? colors.idle;
    const isLoud = event.kind === "diverged";
    const place = drawVertical(u, placeOf(event), color, isLoud || event === pointed, isLoud);
    if (place !== null) FLAGS[event.kind]?.(u.ctx, place, u.bbox.top + 8 * devicePixelRatio, color, colors);
  }
}

export function drawNotFinite(u, xs, color) {
  for (const x of xs) {
    if (x < u.scales.x.min || x > u.scales.x.max) continue;
    triangle(u.ctx, u.valToPos(x, "x", true), u.bbox.top + u.bbox.height, color);
  }
}

// Where the axis leaves points out: a mark at the edge that they lie beyond.
export function drawBeyond(u, { above, below }, color) {
  const { ctx, bbox } = u;
  const size = 4.5 * devicePixelRatio;
  ctx.save();
  ctx.fillStyle = color;
  for (const [points, edge, way] of [[above, bbox.top, 1], [below, bbox.top + bbox.height, -1]]) {
    for (const [x] of points) {
      const place = u.valToPos(x, "x", true);
      ctx.beginPath();
      ctx.moveTo(place, edge);
      ctx.lineTo(place - size, edge + way * 1.7 * size);
      ctx.lineTo(place + size, edge + way * 1.7 * size);
      ctx.fill();
    }
  }
  ctx.restore();
}

// Returns where the line is, null when that is out of view.
function drawVertical(u, x, color, isStrong, isSolid) {
  const { ctx, bbox } = u;
  const place = Math.round(u.valToPos(x, "x", true));
  if (!(place >= bbox.left && place <= bbox.left + bbox.width)) return null;
  ctx.save();
  ctx.strokeStyle = color;
  ctx.globalAlpha = isStrong ? 1 : 0.45;
  ctx.lineWidth = (isStrong ? 2 : 1) * devicePixelRatio;
  if (!isSolid) ctx.setLineDash([3 * devicePixelRatio, 3 * devicePixelRatio]);
  ctx.beginPath();
  ctx.moveTo(place, bbox.top);
  ctx.lineTo(place, bbox.top + bbox.height);
  ctx.stroke();
  ctx.restore();
  return place;
}

function drawRing(ctx, x, y, color, { surface }) {
  ctx.save();
  ctx.lineWidth = 2 * devicePixelRatio;
  ctx.strokeStyle = color;
  ctx.fillStyle = surface;
  ctx.beginPath();
  ctx.arc(x, y, 5 * devicePixelRatio, 0, 2 * Math.PI);
  ctx.fill();
  ctx.stroke();
  ctx.restore();
}

function drawSquare(ctx, x, y, color, { surface, font }) {
  const size = 8 * devicePixelRatio;
  ctx.save();
  ctx.fillStyle = color;
  ctx.fillRect(x - size, y - size, 2 * size, 2 * size);
  ctx.fillStyle = surface;
  ctx.font = `700 ${12 * devicePixelRatio}px ${font}`;
  ctx.textAlign = "center";
  ctx.textBaseline = "middle";
  ctx.fillText("!", x, y);
  ctx.restore();
}

function triangle(ctx, x, y, color) {
  const size = 5 * devicePixelRatio;
  ctx.fillStyle = color;
  ctx.beginPath();
  ctx.moveTo(x, y - 1.7 * size);
  ctx.lineTo(x - size, y);
  ctx.lineTo(x + size, y);
  ctx.fill();
}
