// Saves a chart as a PNG: what is shown, on the page's own background, with its title and legend.
const HEAD = 44;
const LINE = 16;
// A mark beside a name; dashes need more room to be seen.
const MARK = 14;
const DASHED_MARK = 28;

export function saveImage({ canvas, title, legend, colors, name }) {
  const scale = devicePixelRatio;
  const image = document.createElement("canvas");
  image.width = canvas.width;
  const ctx = image.getContext("2d");
  const items = placed(ctx, legend, image.width, colors, scale);
  const head = HEAD + LINE * (items.at(-1)?.row ?? 0);
  image.height = canvas.height + head * scale; // what was set up in the context is gone
  ctx.fillStyle = colors.surface;
  ctx.fillRect(0, 0, image.width, image.height);
  ctx.textBaseline = "middle";
  ctx.fillStyle = colors.text;
  ctx.font = `600 ${14 * scale}px ${colors.font}`;
  ctx.fillText(title, 12 * scale, 16 * scale, image.width - 24 * scale);
  writeLegend(ctx, items, colors, scale);
  ctx.drawImage(canvas, 0, head * scale);
  image.toBlob((blob) => download(blob, `${name.replace(/[^\w-]+/g, "-")}.png`), "image/png");
}

// The items of a legend with where they are: the next row takes what does not fit into one.
function placed(ctx, legend, width, colors, scale) {
  ctx.font = `${11 * scale}px ${colors.font}`;
  const mark = (legend.some(({ dash }) => dash) ? DASHED_MARK : MARK) * scale;
  let [left, row] = [12 * scale, 0];
  return legend.map((item) => {
    const space = ctx.measureText(item.label).width + mark + 5 * scale;
    if (left + space > width && left > 12 * scale) [left, row] = [12 * scale, row + 1];
    const place = { ...item, left, row, mark };
    left += space + 17 * scale;
    return place;
  });
}

function writeLegend(ctx, items, colors, scale) {
  ctx.font = `${11 * scale}px ${colors.font}`;
  ctx.lineWidth = 3 * scale;
  for (const { label, color, dash = [], left, row, mark } of items) {
    const top = (34.5 + LINE * row) * scale;
    ctx.strokeStyle = color;
    ctx.setLineDash(dash.map((length) => length * scale));
    ctx.beginPath();
    ctx.moveTo(left, top);
    ctx.lineTo(left + mark, top);
    ctx.stroke();
    ctx.fillStyle = colors.axis;
    ctx.fillText(label, left + mark + 5 * scale, top);
  }
}

function download(blob, name) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(blob);
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
}
