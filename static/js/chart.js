// One metric's chart: uPlot with an honest band, marks for what is not a number, and a table and words beside it.
/* global uPlot */
import { aboveZero, yRange } from "./axes.js";
import { saveImage } from "./chart_image.js";
import { EventsLane } from "./events_lane.js";
import { readColors } from "./chart_colors.js";
import { drawBeyond, drawEvents, drawNotFinite } from "./chart_marks.js";
import { chip } from "./chart_parts.js";
import { tableOf } from "./chart_table.js";
import { clock, count, decimal, timeLabels, timeTitle } from "./format.js";
import { titleOf } from "./metric_titles.js";
import { beyond, beyondWords } from "./outliers.js";
import { drawBest, drawFaint, drawOverlay, extremes, valueBefore } from "./overlays.js";
import { padded, WHOLE, xAxis, yAxis } from "./plot_axes.js";

const DASHES = [[], [6, 3], [2, 3], [8, 3, 2, 3], [4, 4]];
const LONE_POINTS = 40;
const template = document.getElementById("chart-template");

export class Chart {
  // `options` is shared by all charts and changed in place: weight, isLog, ignoresOutliers, axis.
  constructor(series, options, { onZoom, onReset, onShowAll }) {
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
    this.part("title").textContent = titleOf(series.name);
    this.part("title").title = series.name;
    this.holder = this.part("plot");
    // Other series in the same chart, as { label, series }, and those of the runs that this one goes on from.
    this.overlays = [];
    this.ancestors = [];
    this.marks = { events: [], bestStep: null };
    this.pointed = null;
    this.lane = null;
    this.holder.addEventListener("keydown", (event) => this.#onKey(event));
    this.part("image-button").addEventListener("click", () => this.#saveImage());
    this.part("table-button").addEventListener("click", () => this.#toggleTable());
    this.part("outliers").addEventListener("click", onShowAll);
  }

  // Uses what the series holds now; hidden charts wait until they are seen.
  update(range) {
    this.range = range;
    this.isStale = true;
    this.element.dataset.numValues = this.series.numValues;
    if (this.isVisible) this.draw();
  }

  addOverlay(label, series) {
    this.overlays.push({ label, series });
    this.overlays.sort((a, b) => (a.label < b.label ? -1 : 1));
  }

  // Events go into a lane of their own; the tokens axis needs to know where a step is.
  setMarks(marks) {
    this.marks = marks;
    if (!this.lane) this.lane = new EventsLane(this.element.querySelector(".events-lane"), { onPoint: (event) => this.#point(event) });
    this.lane.setEvents(marks.events);
    this.plot?.redraw(false);
  }

  #point(event) {
    this.pointed = event;
    this.plot?.redraw(false);
  }

  get isEmpty() {
    return this.series.isEmpty && this.overlays.every(({ series }) => series.isEmpty);
  }

  draw() {
    if (!this.range || this.isEmpty) return;
    this.isStale = false;
    const [from, to] = this.range;
    const width = this.holder.clientWidth;
    if (!width) return;
    this.view = this.series.view(this.options.axis, from, to, Math.max(width, 200));
    this.#viewOthers(from, to, Math.max(width, 200));
    const data = this.#columns();
    this.beyond = this.options.ignoresOutliers ? beyond(this.#lines(), this.range, this.options.isLog) : null;
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

  #viewOthers(from, to, maxPoints) {
    const { axis, isLog } = this.options;
    for (const overlay of this.overlays) overlay.view = overlay.series.view(axis, from, to, maxPoints);
    // Their tokens and their time are not this run's.
    const shown = axis === "step" ? this.ancestors : [];
    this.faint = shown.map((series) => ({ ...series.view(axis, from, to, maxPoints), isOverlay: series.name !== this.series.name }));
    this.extremes = extremes([...this.overlays.map(({ view }) => view), ...this.faint], isLog);
  }

  #columns() {
    const { x, mean, smooth, high, low } = this.view;
    const isSmooth = this.options.weight > 0;
    const drawn = [mean, isSmooth ? smooth : mean.map(() => null), high, low];
    const { columns, floored } = this.options.isLog ? aboveZero(x, drawn) : { columns: drawn, floored: [] };
    this.floored = floored;
    return [x, ...columns];
  }

  // All that is drawn in the range, each line with what the rule for outliers looks at.
  #lines() {
    const { x, mean, smooth, low, high } = this.view;
    const own = { x, columns: [mean, low, high], smooth: this.options.weight > 0 ? smooth : null };
    return [own, ...[...this.overlays.map(({ view }) => view), ...this.faint].map((view) => ({ x: view.x, columns: [view.mean] }))];
  }

  #build(data) {
    const colors = readColors(this.element);
    this.colors = colors;
    const { options } = this;
    const [from, to] = this.range;
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
          y: { distr: options.isLog ? 3 : 1, range: (u, min, max) => this.beyond?.range ?? yRange(...this.#withOthers(min, max), options.isLog) },
        },
        axes: [
          xAxis(colors, options.axis === "time" ? { values: (u, ticks) => timeLabels(ticks) } : { incrs: WHOLE, values: (u, ticks) => ticks.map((value) => count(value)) }),
          yAxis(colors, options.isLog),
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
          drawAxes: [(u) => this.#drawBehind(u, colors)],
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
    u.ctx.save();
    this.overlays.forEach(({ view }, index) => drawOverlay(u, view, { color: colors[`overlay-${index + 1}`] ?? colors["overlay-1"], dash: DASHES[index % DASHES.length] }));
    this.#drawBest(u, colors);
    const bad = [this.view, ...this.overlays.map(({ view }) => view)].flatMap((view) => view.bad);
    drawNotFinite(u, bad.map(([x]) => x), colors.bad);
    drawNotFinite(u, this.floored, colors.floor);
    if (this.beyond) drawBeyond(u, this.beyond, colors.floor);
    u.ctx.restore();
    this.lane?.place(u, (event) => this.#placeOf(event));
  }

  // Under the run's own line: whom it was forked from, what it left behind, and what happened.
  #drawBehind(u, colors) {
    const isSmooth = this.options.weight > 0;
    for (const { x, mean, smooth, isOverlay } of this.faint) {
      drawFaint(u, x, isSmooth && !isOverlay ? smooth : mean, isOverlay ? colors["ancestor-overlay"] : colors.ancestor);
    }
    for (const { x, value } of this.series.abandoned(this.options.axis)) drawFaint(u, x, value, colors.abandoned, [4, 3]);
    drawEvents(u, this.marks.events, this.pointed, { colors, placeOf: (event) => this.#placeOf(event) });
  }

  #placeOf({ step, time }) {
    if (this.options.axis === "time") return time;
    return this.options.axis === "tokens" && this.series.tokensAt ? this.series.tokensAt(step) : step;
  }

  #drawBest(u, colors) {
    const { bestStep } = this.marks;
    const overall = this.overlays[0];
    if (bestStep === null || !overall) return;
    const found = valueBefore(overall.series, bestStep);
    const index = overall.series.step.lastIndexOf(bestStep);
    if (!found || found[0] !== bestStep) return;
    const x = this.#placeOf({ step: bestStep, time: overall.series.time[index] ?? 0 });
    drawBest(u, x, found[1], { color: colors["overlay-1"], surface: colors.surface, font: colors.font });
  }

  // The range of the run's own values and of what else is in view.
  #withOthers(min, max) {
    const values = [min, max, ...(this.extremes ?? [])].filter((value) => value !== null && value !== undefined);
    return values.length ? [Math.min(...values), Math.max(...values)] : [null, null];
  }

  #legend(colors) {
    const items = [];
    if (this.overlays.length && !this.series.isEmpty) items.push({ label: "training", color: colors.line });
    this.overlays.forEach(({ label }, index) => items.push({ label, color: colors[`overlay-${index + 1}`] ?? colors["overlay-1"] }));
    if (this.ancestors.length) items.push({ label: "before the fork", color: colors.ancestor });
    if (this.series.hasAbandoned) items.push({ label: "left behind", color: colors.abandoned });
    return items;
  }

  #showLegend() {
    const list = this.part("legend");
    const items = this.#legend(this.colors);
    list.hidden = items.length === 0;
    list.replaceChildren(...items.map(({ label, color }) => {
      const item = document.createElement("li");
      const swatch = document.createElement("span");
      swatch.className = "legend-swatch";
      swatch.style.background = color;
      item.append(swatch, label);
      return item;
    }));
  }

  #saveImage() {
    if (!this.plot) return;
    const { colors } = this;
    const axis = this.options.axis === "time" ? timeTitle(...this.range) : this.options.axis;
    const title = `${this.part("title").textContent} by ${axis}${this.beyond ? `, outliers left out: ${beyondWords(this.beyond)}` : ""}`;
    saveImage({ canvas: this.plot.ctx.canvas, title, legend: this.#legend(colors), colors, name: this.series.name });
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
    const parts = [`step ${count(view.step[index])}`];
    if (view.mean[index] === null) parts.push(bad ? "not finite" : "no value");
    else parts.push(decimal(view.mean[index]));
    if (this.options.axis === "time") parts.push(clock(view.x[index]));
    if (this.options.weight > 0 && view.smooth[index] !== null) parts.push(`smooth ${decimal(view.smooth[index])}`);
    if (view.numValues[index] > 1 && view.low[index] !== null) {
      parts.push(`${decimal(view.low[index])} to ${decimal(view.high[index])} in ${count(view.numValues[index])}`);
    }
    for (const { label, series } of this.overlays) {
      const found = valueBefore(series, view.step[index]);
      if (found) parts.push(`${label} ${decimal(found[1])} (step ${count(found[0])})`);
    }
    readout.textContent = parts.join("  \u00b7  ");
  }

  #lastWords() {
    const { last } = this.series.facts;
    return last === null ? "" : decimal(last);
  }

  #say() {
    const { first, last, lowest, lowestStep, isRough } = this.series.facts;
    const place = isRough ? "near" : "at";
    const words = [];
    if (first !== null) words.push(`${decimal(first)} \u2192 ${decimal(last)}, lowest ${decimal(lowest)} ${place} step ${count(lowestStep)}`);
    if (this.view.width > 1) words.push(`${count(this.view.width)} steps a point, with their range`);
    for (const { label, series: { facts } } of this.overlays) {
      if (facts.last !== null) words.push(`${label} ${decimal(facts.first)} \u2192 ${decimal(facts.last)}, lowest ${decimal(facts.lowest)} at step ${count(facts.lowestStep)}`);
    }
    if (this.beyond) words.push(`outliers beyond the axis: ${beyondWords(this.beyond)}`);
    if (this.series.hasAbandoned) words.push("grey: left behind when the run went back");
    if (this.ancestors.length) words.push("faint: the run it was forked from");
    const summary = words.join("; ");
    this.part("summary").textContent = summary;
    this.part("summary").title = summary;
    this.holder.setAttribute("aria-label", `${this.part("title").textContent}: ${summary}`);
    this.#showChips();
    if (!this.plot || this.plot.cursor.left < 0) this.part("readout").textContent = this.#lastWords();
    if (!this.part("table").hidden) this.#fillTable();
    this.#showLegend();
  }

  #showChips() {
    const bad = [this.series, ...this.overlays.map(({ series }) => series)].map(({ facts }) => facts).filter(({ numBad }) => numBad > 0);
    const first = bad.reduce((a, b) => (b.firstBad < a.firstBad ? b : a), bad[0]);
    const numBad = bad.reduce((sum, facts) => sum + facts.numBad, 0);
    chip(this.part("bad"), numBad, `${count(numBad)} not finite, first ${first?.isRough ? "near" : "at"} step ${count(first?.firstBad)}`);
    chip(this.part("outliers"), this.beyond ? 1 : 0, this.beyond ? beyondWords(this.beyond) : "");
    this.part("outliers").title = this.beyond ? `${farWords(this.beyond)}Press to show all` : "";
    const { length: numFloored } = this.floored;
    chip(this.part("floor"), numFloored, `${count(numFloored)} ${numFloored === 1 ? "point reaches" : "points reach"} 0 or below`);
  }

  #onKey(event) {
    if (event.key === "Escape") this.onReset();
    const move = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!move || !this.plot) return;
    event.preventDefault();
    const { x } = this.view;
    if (!x.length) return;
    const at = this.plot.cursor.left < 0 ? x.length : this.plot.cursor.idx;
    const next = Math.min(Math.max(at + move, 0), x.length - 1);
    // All charts move theirs, as with the pointer.
    this.plot.setCursor({ left: this.plot.valToPos(x[next], "x"), top: 10 }, true, true);
  }

  #toggleTable() {
    const table = this.part("table");
    table.hidden = !table.hidden;
    this.part("table-button").setAttribute("aria-expanded", String(!table.hidden));
    if (!table.hidden && this.view) this.#fillTable();
  }

  #fillTable() {
    this.part("table").replaceChildren(tableOf(this.view, this.overlays));
  }
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

// The furthest of the points that an axis leaves out.
function farWords({ above, below, leaves }) {
  const highest = above.reduce((far, [, value]) => Math.max(far, value), -Infinity);
  const lowest = below.reduce((far, [, value]) => Math.min(far, value), Infinity);
  const words = [above.length && `the highest is ${decimal(highest)}`, below.length && `the lowest is ${decimal(lowest)}`, leaves && "the smoothed line leaves the chart, too"];
  return `Beyond the axis: ${words.filter(Boolean).join("; ")}. `;
}

function cursorPoint(color) {
  const point = document.createElement("div");
  point.style.background = color;
  return point;
}
