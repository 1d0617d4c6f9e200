// Saves a chart as a PNG: what is shown, on the page's own background, with its title and legend.
const HEAD = 44;

export function saveImage({ canvas, title, legend, colors, name }) {
  const scale = devicePixelRatio;
  const image = document.createElement("canvas");
  image.width = canvas.width;
  image.height = canvas.height + HEAD * scale;
  const ctx = image.getContext("2d");
  ctx.fillStyle = colors.surface;
  ctx.fillRect(0, 0, image.width, image.height);
  ctx.textBaseline = "middle";
  ctx.fillStyle = colors.text;
  ctx.font = `600 ${14 * scale}px ${colors.font}`;
  ctx.fillText(title, 12 * scale, 16 * scale, image.width - 24 * scale);
  writeLegend(ctx, legend, colors, scale);
  ctx.drawImage(canvas, 0, HEAD * scale);
  image.toBlob((blob) => download(blob, `${name.replace(/[^\w-]+/g, "-")}.png`), "image/png");
}

function writeLegend(ctx, legend, colors, scale) {
  ctx.font = `${11 * scale}px ${colors.font}`;
  let left = 12 * scale;
  for (const { label, color } of legend) {
    ctx.fillStyle = color;
    ctx.fillRect(left, 33 * scale, 14 * scale, 3 * scale);
    ctx.fillStyle = colors.axis;
    ctx.fillText(label, left + 19 * scale, 35 * scale);
    left += ctx.measureText(label).width + 36 * scale;
  }
}

function download(blob, name) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(blob);
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
}
