// One metric of several runs in one chart: a line for each, marks for what is not a number, values and a table beside it.
/* global uPlot */
import { yRange } from "./axes.js";
import { saveImage } from "./chart_image.js";
import { readColors } from "./chart_colors.js";
import { drawNotFinite } from "./chart_marks.js";
import { chip } from "./chart_parts.js";
import { drawEntry } from "./compare_lines.js";
import { tableOf } from "./compare_table.js";
import { count } from "./format.js";
import { oncePerFrame } from "./frames.js";
import { bestOf, titleOf } from "./metric_titles.js";
import { extremes, VALIDATION } from "./overlays.js";
import { padded, xAxis, yAxis } from "./plot_axes.js";
import { RUN_AXES } from "./run_axes.js";
import { badWords, lastWords, nearestPlace, nextPlace, summaryOf, wordsAt } from "./run_values.js";

const MAX_LABEL = 48;
const template = document.getElementById("compare-chart-template");

export class CompareChart {
  // `runs` and `options` are shared by all charts and changed in place.
  constructor(name, runs, options, { onZoom, onReset }) {
    this.name = name;
    this.runs = runs;
    this.options = options;
    this.onZoom = onZoom;
    this.onReset = onReset;
    this.range = null;
    this.plot = null;
    this.isVisible = false;
    this.isStale = true;
    this.entries = [];
    this.pointed = null;
    // The pointer moves more often than a frame is shown.
    this.readSoon = oncePerFrame(() => this.#read());
    this.items = new Map();
    this.element = template.content.firstElementChild.cloneNode(true);
    this.part = (part) => this.element.querySelector(`.chart-${part}`);
    this.element.dataset.metric = name;
    this.title = titleOf(name);
    this.part("title").textContent = this.title;
    this.part("title").title = name;
    this.holder = this.part("plot");
    this.holder.addEventListener("keydown", (event) => this.#onKey(event));
    this.part("image-button").addEventListener("click", () => this.#saveImage());
    this.part("table-button").addEventListener("click", () => this.#toggleTable());
  }

  get names() {
    return this.name === "loss" && this.options.hasValidation ? ["loss", VALIDATION] : [this.name];
  }

  // The lines of the runs that are not hidden.
  lines() {
    const shown = this.runs.filter((run) => !run.isHidden);
    return this.names.flatMap((name) => shown.map((run) => run.line(name)).filter((line) => line !== null));
  }

  // Uses what the lines hold now; hidden charts wait until they are seen.
  update(range) {
    this.range = range;
    this.isStale = true;
    if (this.isVisible) this.draw();
  }

  draw() {
    const width = this.holder.clientWidth;
    if (!this.range) this.part("summary").textContent = this.#emptyWords();
    if (!this.range || !width) return;
    this.isStale = false;
    const [from, to] = this.range;
    this.entries = this.#entries(from, to, Math.max(width, 200));
    this.extremes = this.#extremes();
    const data = [[from, to], this.extremes ?? [null, null]];
    if (!this.plot) this.#build(data);
    else this.plot.batch(() => {
      this.plot.setData(data, false);
      this.plot.setScale("x", padded(from, to));
    });
    this.#say();
  }

  #entries(from, to, maxPoints) {
    const { axis } = this.options;
    const shown = this.lines().filter((line) => !line.series.isEmpty && line.run.isPlacedOn(axis));
    return shown.map((line) => {
      const { run, series } = line;
      return { run, line, series, look: run.look, isValidation: line.name === VALIDATION, view: series.view(axis, from, to, maxPoints) };
    });
  }

  #extremes() {
    const views = this.entries.map(({ view }) => view);
    return extremes([...views, ...views.map(({ smooth }) => ({ mean: smooth }))], this.options.isLog);
  }

  rebuild() {
    this.plot?.destroy();
    this.plot = null;
    if (this.isVisible) this.draw();
    else this.isStale = true;
  }

  #build(data) {
    const colors = readColors(this.element);
    this.colors = colors;
    const { axis, isLog } = this.options;
    this.plot = new uPlot(
      {
        width: this.holder.clientWidth,
        height: this.holder.clientHeight,
        legend: { show: false },
        padding: [8, 22, 0, 0],
        scales: {
          x: { time: false, range: (u, min, max) => [min, max] },
          y: { distr: isLog ? 3 : 1, range: () => yRange(...(this.extremes ?? [null, null]), isLog) },
        },
        axes: [xAxis(colors, { incrs: RUN_AXES[axis].incrs, values: (u, ticks) => ticks.map((value) => RUN_AXES[axis].label(value)) }), yAxis(colors, isLog)],
        // The lines are drawn by hand: each has places of its own on the x axis.
        series: [{}, { stroke: "transparent", width: 0, points: { show: false } }],
        cursor: {
          y: false,
          points: { show: false },
          drag: { x: true, y: false, setScale: false },
          sync: { key: "runs", scales: ["x", null], filters: { pub: (type) => type === "mousemove" || type === "mouseleave" } },
          bind: { dblclick: () => () => this.onReset() },
        },
        hooks: {
          draw: [(u) => this.#drawLines(u)],
          setCursor: [() => this.readSoon()],
          setSelect: [(u) => this.#zoomTo(u)],
        },
      },
      data,
      this.holder,
    );
    this.plot.setScale("x", padded(...this.range));
  }

  resize() {
    if (!this.plot || !this.holder.clientWidth) return;
    this.plot.setSize({ width: this.holder.clientWidth, height: this.holder.clientHeight });
    this.draw();
  }

  // Brings one run to the front; null lets all be the same again.
  point(run) {
    if (run === this.pointed) return;
    this.pointed = run;
    for (const [item, { entry }] of this.items) item.classList.toggle("is-pointed", entry.run === run);
    if (this.isVisible) this.plot?.redraw(false);
  }

  #drawLines(u) {
    const isSmooth = this.options.weight > 0;
    const isPointed = this.entries.some(({ run }) => run === this.pointed);
    const emphasisOf = ({ run }) => (isPointed ? (run === this.pointed ? 1 : -1) : 0);
    const ordered = [...this.entries].sort((a, b) => emphasisOf(a) - emphasisOf(b));
    u.ctx.save();
    for (const entry of ordered) {
      drawEntry(u, entry, { isSmooth, emphasis: emphasisOf(entry) });
      drawNotFinite(u, entry.view.bad.map(([x]) => x), entry.look.color);
    }
    drawNotFinite(u, this.#floored(), this.colors.floor);
    u.ctx.restore();
  }

  // Where a logarithmic axis cannot show a value.
  #floored() {
    if (!this.options.isLog) return [];
    return this.entries.flatMap(({ view }) => view.x.filter((_, index) => view.mean[index] !== null && view.mean[index] <= 0));
  }

  #zoomTo(u) {
    if (u.select.width < 4) return;
    const from = u.posToVal(u.select.left, "x");
    const to = u.posToVal(u.select.left + u.select.width, "x");
    u.setSelect({ left: 0, top: 0, width: 0, height: 0 }, false);
    this.onZoom(from, to);
  }

  // Where the crosshair is: at the nearest value of any run; null where there is none.
  #place() {
    if (!this.plot || this.plot.cursor.left < 0) return null;
    return nearestPlace(this.entries, this.plot.posToVal(this.plot.cursor.left, "x"));
  }

  #read() {
    const x = this.#place();
    const { axis, weight } = this.options;
    this.part("readout").textContent = x === null ? "" : RUN_AXES[axis].wordsAt(x);
    const best = bestOf(this.name);
    for (const { entry, value, note } of this.items.values()) {
      const isSmooth = weight > 0 && !entry.isValidation;
      [value.textContent, note.textContent] = x === null ? lastWords(entry, best) : wordsAt(entry, x, axis, isSmooth);
      note.title = note.textContent;
    }
  }

  #say() {
    this.#listValues();
    this.#read();
    const summary = this.entries.length ? summaryOf(this.entries, this.options) : this.#emptyWords();
    this.part("summary").textContent = summary;
    this.part("summary").title = summary;
    const number = this.entries.length;
    this.holder.setAttribute("aria-label", `${this.title} by ${RUN_AXES[this.options.axis].title}, ${number} ${number === 1 ? "line" : "lines"}; their values are listed below`);
    this.#showChips();
    if (!this.part("table").hidden) this.#fillTable();
  }

  // Why there is no line.
  #emptyWords() {
    const lines = this.lines();
    if (!lines.length) return "All runs that have this are hidden.";
    return lines.some(({ isHeld }) => !isHeld) ? "Loading\u2026" : "Nothing to show on this axis.";
  }

  // A line of text for each line that is drawn; made anew only where other lines are.
  #listValues() {
    const key = this.entries.map(({ line }) => `${this.runs.indexOf(line.run)} ${line.name}`).join();
    const list = this.part("values");
    if (list.dataset.key !== key) {
      list.dataset.key = key;
      this.items = new Map(this.entries.map((entry) => {
        const made = itemOf(entry, this.runs.indexOf(entry.run));
        return [made.item, made];
      }));
      list.replaceChildren(...this.items.keys());
    }
    [...this.items.values()].forEach((made, index) => {
      made.entry = this.entries[index];
    });
  }

  #showChips() {
    const { numBad, text, title } = badWords(this.entries);
    chip(this.part("bad"), numBad, text);
    this.part("bad").title = title;
    const numFloored = this.#floored().length;
    chip(this.part("floor"), numFloored, `${count(numFloored)} ${numFloored === 1 ? "point is" : "points are"} 0 or below`);
  }

  #onKey(event) {
    if (event.key === "Escape") this.onReset();
    const move = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!move || !this.plot) return;
    event.preventDefault();
    const x = this.#place() ?? Infinity;
    const next = nextPlace(this.entries, x, x === Infinity ? -1 : move, this.range);
    // All charts move theirs, as with the pointer.
    if (next !== null) this.plot.setCursor({ left: this.plot.valToPos(next, "x"), top: 10 }, true, true);
  }

  #toggleTable() {
    const table = this.part("table");
    table.hidden = !table.hidden;
    this.part("table-button").setAttribute("aria-expanded", String(!table.hidden));
    if (!table.hidden) this.#fillTable();
  }

  #fillTable() {
    this.part("table").replaceChildren(tableOf(this.entries));
  }

  #saveImage() {
    if (!this.plot) return;
    const legend = this.entries.filter(({ isValidation }) => !isValidation).map(({ run, look }) => ({ label: run.title.slice(0, MAX_LABEL), ...look }));
    const { axis, weight } = this.options;
    const title = `${this.title} by ${RUN_AXES[axis].title}${weight > 0 ? `, smoothed with weight ${weight.toFixed(2)}` : ""}`;
    saveImage({ canvas: this.plot.ctx.canvas, title, legend, colors: this.colors, name: `compare-${this.name}` });
  }
}

function itemOf(entry, place) {
  const item = document.createElement("li");
  item.dataset.runKey = place;
  const swatch = document.querySelector(`[data-run-keys] [data-run-key="${place}"] .run-line`).cloneNode(true);
  const name = document.createElement("bdi");
  name.className = "value-name";
  name.textContent = entry.run.title;
  name.title = entry.run.title;
  const value = document.createElement("span");
  value.className = "value-number";
  const note = document.createElement("span");
  note.className = "value-note muted";
  item.append(swatch, name);
  if (entry.isValidation) {
    item.classList.add("is-validation");
    const kind = document.createElement("span");
    kind.className = "value-kind";
    kind.textContent = "validation";
    item.append(kind);
  }
  item.append(value, note);
  return { item, entry, value, note };
}
