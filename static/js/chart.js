// One metric's chart: uPlot with an honest band, marks for what is not a number, and a table and words beside it.
/* global uPlot */
import { clock, count, decimal, tick, timeLabels } from "./format.js";

const TITLES = {
  loss: "Loss per token",
  learning_rate: "Learning rate",
  grad_norm: "Gradient norm",
  tokens_per_s: "Tokens per second",
  step_time_s: "Compute time of a step in seconds",
  client_gap_s: "Waiting for the client in seconds",
  queue_wait_s: "Waiting in the queue in seconds",
  loss_sum: "Loss, summed",
  tokens: "Tokens of a step",
};
const MAX_TABLE_ROWS = 300;
const LONE_POINTS = 40;
const template = document.getElementById("chart-template");

export class Chart {
  // `options` is shared by all charts and changed in place: weight, isLog, axis.
  constructor(series, options, { onZoom, onReset }) {
    this.series = series;
    this.options = options;
    this.onZoom = onZoom;
    this.onReset = onReset;
    this.range = null;
    this.plot = null;
    this.isVisible = false;
    this.isStale = true;
    this.element = template.content.firstElementChild.cloneNode(true);
    this.part = (name) => this.element.querySelector(`.chart-${name}`);
    this.element.dataset.metric = series.name;
    this.part("title").textContent = TITLES[series.name] ?? series.name;
    this.part("title").title = series.name;
    this.holder = this.part("plot");
    this.holder.addEventListener("keydown", (event) => this.#onKey(event));
    this.part("table-button").addEventListener("click", () => this.#toggleTable());
  }

  // Uses what the series holds now; hidden charts wait until they are seen.
  update(range) {
    this.range = range;
    this.isStale = true;
    this.element.dataset.numValues = this.series.numValues;
    if (this.isVisible) this.draw();
  }

  draw() {
    if (!this.range || this.series.isEmpty) return;
    this.isStale = false;
    const [from, to] = this.range;
    const width = this.holder.clientWidth;
    if (!width) return;
    this.view = this.series.view(this.options.axis, from, to, Math.max(width, 200));
    const data = this.#columns();
    if (!this.plot) this.#build(data);
    else this.plot.batch(() => {
      this.plot.setData(data, false);
      this.plot.setScale("x", padded(from, to));
    });
    this.#say();
  }

  rebuild() {
    this.plot?.destroy();
    this.plot = null;
    if (this.isVisible) this.draw();
    else this.isStale = true;
  }

  #columns() {
    const { x, mean, smooth, high, low } = this.view;
    const isSmooth = this.options.weight > 0;
    const drawn = [mean, isSmooth ? smooth : mean.map(() => null), high, low];
    this.floored = [];
    if (this.options.isLog) {
      mean.forEach((value, index) => {
        if (value !== null && value <= 0) this.floored.push(x[index]);
      });
      return [x, ...drawn.map((column) => column.map((value) => (value !== null && value > 0 ? value : null)))];
    }
    return [x, ...drawn];
  }

  #build(data) {
    const colors = readColors(this.element);
    const { options } = this;
    const [from, to] = this.range;
    const axis = {
      stroke: colors.axis,
      grid: { stroke: colors.grid, width: 1 },
      ticks: { show: false },
      font: `11px ${colors.font}`,
      gap: 6,
    };
    const isSmooth = options.weight > 0;
    const points = { show: (u, index) => this.#isSparse(u, index), filter: lonePoints, size: 4 };
    this.plot = new uPlot(
      {
        width: this.holder.clientWidth,
        height: this.holder.clientHeight,
        legend: { show: false },
        padding: [8, 22, 0, 0],
        scales: {
          x: { time: options.axis === "time", range: (u, min, max) => [min, max] },
          y: { distr: options.isLog ? 3 : 1, range: (u, min, max) => yRange(min, max, options.isLog) },
        },
        axes: [
          { ...axis, size: 26, space: 56, ...(options.axis === "step" ? { incrs: WHOLE, values: (u, ticks) => ticks.map((value) => count(value)) } : { values: (u, ticks) => timeLabels(ticks) }) },
          {
            ...axis,
            size: 54,
            space: 34,
            splits: (u, index, min, max) => niceTicks(min, max, options.isLog),
            filter: (u, ticks) => ticks,
            values: (u, ticks) => ticks.map((value, index) => tick(value, tickStep(ticks, index))),
          },
        ],
        series: [
          {},
          { stroke: isSmooth ? colors.raw : colors.line, width: isSmooth ? 1 : 1.6, points: { ...points, stroke: isSmooth ? colors.raw : colors.line, fill: isSmooth ? colors.raw : colors.line } },
          { stroke: colors.line, width: 1.8, points: { ...points, stroke: colors.line, fill: colors.line } },
          { stroke: "transparent", width: 0, points: { show: false } },
          { stroke: "transparent", width: 0, points: { show: false } },
        ],
        bands: [{ series: [3, 4], fill: colors.band }],
        cursor: {
          y: false,
          points: { show: (u, index) => (index === 1 || index === 2 ? cursorPoint(colors.line) : null), size: 7 },
          drag: { x: true, y: false, setScale: false },
          sync: { key: "run", scales: ["x", null], filters: { pub: (type) => type === "mousemove" || type === "mouseleave" } },
          bind: { dblclick: () => () => this.onReset() },
        },
        hooks: {
          draw: [(u) => this.#drawMarks(u, colors)],
          setCursor: [(u) => this.#read(u)],
          setSelect: [(u) => this.#zoomTo(u)],
        },
      },
      data,
      this.holder,
    );
    this.plot.setScale("x", padded(from, to));
  }

  #isSparse(u, index) {
    return u.data[index].length <= LONE_POINTS;
  }

  resize() {
    if (!this.plot || !this.holder.clientWidth) return;
    this.plot.setSize({ width: this.holder.clientWidth, height: this.holder.clientHeight });
    this.draw();
  }

  #zoomTo(u) {
    if (u.select.width < 4) return;
    const from = u.posToVal(u.select.left, "x");
    const to = u.posToVal(u.select.left + u.select.width, "x");
    u.setSelect({ left: 0, top: 0, width: 0, height: 0 }, false);
    this.onZoom(from, to);
  }

  #drawMarks(u, colors) {
    const { ctx, bbox } = u;
    const inside = (x) => x >= u.scales.x.min && x <= u.scales.x.max;
    ctx.save();
    for (const { step, time, value } of this.series.abandoned) {
      const axis = this.options.axis === "step" ? step : time;
      strokeLine(u, axis, value, colors.abandoned);
    }
    for (const [x] of this.view.bad) if (inside(x)) triangle(ctx, u.valToPos(x, "x", true), bbox.top + bbox.height, colors.bad);
    for (const x of this.floored) if (inside(x)) triangle(ctx, u.valToPos(x, "x", true), bbox.top + bbox.height, colors.floor);
    ctx.restore();
  }

  #read(u) {
    const readout = this.part("readout");
    const index = u.cursor.idx;
    const { view } = this;
    if (index === null || index === undefined || u.cursor.left < 0 || index >= view.x.length) {
      readout.textContent = this.#lastWords();
      return;
    }
    const bad = view.bad.find(([x]) => x === view.x[index]);
    const parts = [this.options.axis === "time" ? clock(view.x[index]) : `step ${count(view.step[index])}`];
    if (view.mean[index] === null) parts.push(bad ? "not finite" : "no value");
    else parts.push(decimal(view.mean[index]));
    if (this.options.weight > 0 && view.smooth[index] !== null) parts.push(`smooth ${decimal(view.smooth[index])}`);
    if (view.numValues[index] > 1 && view.low[index] !== null) {
      parts.push(`${decimal(view.low[index])} to ${decimal(view.high[index])} in ${count(view.numValues[index])}`);
    }
    readout.textContent = parts.join("  \u00b7  ");
  }

  #lastWords() {
    const { last } = this.series.facts;
    return last === null ? "" : decimal(last);
  }

  #say() {
    const { first, last, lowest, lowestStep, numBad, firstBad, isRough } = this.series.facts;
    const place = isRough ? "near" : "at";
    const words = [];
    if (first !== null) words.push(`${decimal(first)} \u2192 ${decimal(last)}, lowest ${decimal(lowest)} ${place} step ${count(lowestStep)}`);
    if (this.view.width > 1) words.push(`${count(this.view.width)} steps a point, with their range`);
    if (this.series.abandoned.length) words.push("grey: left behind when the run went back");
    const summary = words.join("; ");
    this.part("summary").textContent = summary;
    this.part("summary").title = summary;
    this.holder.setAttribute("aria-label", `${this.part("title").textContent}: ${summary}`);
    chip(this.part("bad"), numBad, `${count(numBad)} not finite, first ${place} step ${count(firstBad)}`);
    chip(this.part("floor"), this.floored.length, `${count(this.floored.length)} at or below 0`);
    if (!this.plot || this.plot.cursor.left < 0) this.part("readout").textContent = this.#lastWords();
    if (!this.part("table").hidden) this.#fillTable();
  }

  #onKey(event) {
    if (event.key === "Escape") this.onReset();
    const move = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!move || !this.plot) return;
    event.preventDefault();
    const { x } = this.view;
    const at = this.plot.cursor.left < 0 ? x.length : this.plot.cursor.idx;
    const next = Math.min(Math.max(at + move, 0), x.length - 1);
    this.plot.setCursor({ left: this.plot.valToPos(x[next], "x"), top: 10 });
  }

  #toggleTable() {
    const table = this.part("table");
    table.hidden = !table.hidden;
    this.part("table-button").setAttribute("aria-expanded", String(!table.hidden));
    if (!table.hidden && this.view) this.#fillTable();
  }

  #fillTable() {
    const { view } = this;
    const isBucketed = view.width > 0;
    const heads = ["Step", isBucketed ? "Mean" : "Value", "Smoothed", ...(isBucketed ? ["Lowest", "Highest", "Values"] : [])];
    const table = document.createElement("table");
    table.className = "table";
    table.createTHead().append(rowOf("th", heads));
    const body = table.createTBody();
    for (let index = view.x.length - 1; index >= 0 && view.x.length - index <= MAX_TABLE_ROWS; index -= 1) {
      const value = view.mean[index] === null ? "not finite" : decimal(view.mean[index]);
      const range = isBucketed ? [decimal(view.low[index]), decimal(view.high[index]), count(view.numValues[index])] : [];
      body.append(rowOf("td", [count(view.step[index]), value, decimal(view.smooth[index]), ...range]));
    }
    this.part("table").replaceChildren(table);
  }
}

// Steps are whole numbers, and so are their labels.
const WHOLE = [1, 2, 5].flatMap((digit) => Array.from({ length: 10 }, (_, power) => digit * 10 ** power)).sort((a, b) => a - b);

function rowOf(kind, texts) {
  const row = document.createElement("tr");
  for (const text of texts) {
    const cell = document.createElement(kind);
    cell.className = "number";
    cell.textContent = text;
    row.append(cell);
  }
  return row;
}

function chip(element, number, text) {
  element.hidden = number === 0;
  if (number) element.textContent = text;
}

function padded(from, to) {
  return from === to ? { min: from - 1, max: to + 1 } : { min: from, max: to };
}

function yRange(min, max, isLog) {
  if (min === null || max === null) return isLog ? [0.1, 1] : [0, 1];
  // Rounding in the average makes a constant vary in its last digits; such a range has no ticks.
  const isConstant = max - min <= 1e-7 * Math.max(Math.abs(min), Math.abs(max));
  if (isLog) return isConstant ? [min / 2, max * 2] : [min / (max / min) ** 0.06, max * (max / min) ** 0.06];
  const space = isConstant ? Math.abs(max) * 0.1 || 1 : (max - min) * 0.07;
  // Measures that cannot be negative do not get an axis below zero.
  return [min >= 0 ? Math.max(min - space, 0) : min - space, max + space];
}

function niceTicks(min, max, isLog) {
  if (!isLog || max / min < 8) return linearTicks(min, max);
  const digits = max / min > 1000 ? [1] : [1, 2, 5];
  const ticks = [];
  for (let power = Math.floor(Math.log10(min)); power <= Math.ceil(Math.log10(max)); power += 1) {
    for (const digit of digits) ticks.push(Number(`${digit}e${power}`));
  }
  return ticks.filter((value) => value >= min && value <= max);
}

function linearTicks(min, max) {
  const rough = (max - min) / 4;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((digit) => digit * power).find((size) => size >= rough * 0.999);
  const first = Math.ceil(min / step - 1e-9);
  const number = Math.min(Math.floor(max / step + 1e-9) - first + 1, 12);
  return Array.from({ length: Math.max(number, 0) }, (_, index) => Number(((first + index) * step).toPrecision(12)));
}

function tickStep(ticks, index) {
  const other = index > 0 ? ticks[index - 1] : ticks[index + 1];
  return other === undefined ? ticks[index] / 100 : Math.abs(ticks[index] - other);
}

// A value between two gaps would be no line at all: it is drawn as a dot.
function lonePoints(u, index, isShown) {
  if (isShown) return null;
  const column = u.data[index];
  const lone = [];
  const [first, last] = u.series[0].idxs;
  for (let i = first; i <= last; i += 1) {
    if (column[i] !== null && (column[i - 1] ?? null) === null && (column[i + 1] ?? null) === null) lone.push(i);
  }
  return lone.length ? lone : null;
}

function cursorPoint(color) {
  const point = document.createElement("div");
  point.style.background = color;
  return point;
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

function strokeLine(u, xs, values, color) {
  const { ctx, bbox } = u;
  ctx.save();
  ctx.beginPath();
  ctx.rect(bbox.left, bbox.top, bbox.width, bbox.height);
  ctx.clip();
  ctx.strokeStyle = color;
  ctx.lineWidth = devicePixelRatio;
  ctx.setLineDash([4 * devicePixelRatio, 3 * devicePixelRatio]);
  ctx.beginPath();
  xs.forEach((x, index) => {
    if (Number.isFinite(values[index])) ctx.lineTo(u.valToPos(x, "x", true), u.valToPos(values[index], "y", true));
  });
  ctx.stroke();
  ctx.restore();
}

// Canvas needs colours resolved for the theme in force.
function readColors(element) {
  const probe = document.createElement("span");
  element.append(probe);
  const style = getComputedStyle(probe);
  const read = (name) => {
    probe.style.color = `var(--chart-${name})`;
    return style.color;
  };
  const colors = Object.fromEntries(["line", "raw", "band", "abandoned", "grid", "axis", "bad", "floor"].map((name) => [name, read(name)]));
  colors.font = style.fontFamily;
  probe.remove();
  return colors;
}
