// The page that compares runs: their lines in one chart for each metric, read as they are looked at and kept up to date.
import { getJson, refreshParts } from "./api.js";
import { onComingBack } from "./coming_back.js";
import { CompareChart } from "./compare_chart.js";
import { hashOf, showTools, viewOf } from "./compare_view.js";
import { ComparedRun } from "./compared_runs.js";
import { oncePerFrame } from "./frames.js";
import { LineLoads } from "./line_loads.js";
import { VALIDATION } from "./overlays.js";
import { shownRange } from "./shown_range.js";
import { keepWeight } from "./smoothing.js";
import { showState } from "./socket.js";

const POLL_MS = 5000;
// With more operations behind, values are read in buckets rather than one by one.
const MAX_BEHIND = 20_000;
const REFINE_MS = 250;
const LOADED_MS = 200;
const FIRST = ["loss"];
const LAST = ["learning_rate", "grad_norm", "tokens_per_s", "step_time_s", "client_gap_s", "queue_wait_s", "loss_sum", "tokens"];

const grid = document.querySelector("[data-chart-grid]");
const tools = document.querySelector("[data-chart-tools]");
const keys = document.querySelector("[data-run-keys]");
const whole = document.querySelector("[data-follow]");
const { panels } = document.querySelector("[data-panels]").dataset;

// Weight, axis and what else the tools have; shared with the charts.
const options = {};
const runs = JSON.parse(document.getElementById("compare-lines").textContent).map((run, place) => new ComparedRun(run, states()[place]));
const charts = new Map();
let zoom = null;

function states() {
  return JSON.parse(document.querySelector("[data-part='compare-results']").dataset.states);
}

function keyOf(place) {
  return keys.querySelector(`[data-run-key="${place}"]`);
}

// The look of a run's line is that of its mark in the legend, in the theme in force.
function readLooks() {
  runs.forEach((run, place) => {
    const { stroke, strokeDasharray } = getComputedStyle(keyOf(place).querySelector(".run-line path"));
    run.look = { color: stroke, dash: strokeDasharray === "none" ? [] : strokeDasharray.split(",").map(parseFloat) };
  });
}

// Charts ------------------------------------------------------------------------------------------

const seen = new IntersectionObserver((entries) => {
  for (const { target, isIntersecting } of entries) {
    const chart = charts.get(target.dataset.metric);
    chart.isVisible = isIntersecting;
    if (isIntersecting && chart.isStale) scheduleDraw();
  }
  loads.pump();
}, { rootMargin: "200px" });

const resized = new ResizeObserver((entries) => {
  for (const { target } of entries) charts.get(target.closest("[data-metric]").dataset.metric)?.resize();
});

function addCharts() {
  const names = new Set(runs.flatMap((run) => [...run.names]));
  document.querySelector("[data-validation-tool]").hidden = !names.has(VALIDATION);
  if (names.delete(VALIDATION)) names.add("loss");
  for (const name of names) if (!charts.has(name)) addChart(name);
  document.querySelector("[data-chart-empty]").hidden = charts.size > 0;
  tools.elements.axis.options[1].disabled = !names.has("tokens");
}

function addChart(name) {
  const chart = new CompareChart(name, runs, options, { onZoom: setZoom, onReset: () => setZoom(null) });
  charts.set(name, chart);
  const next = [...grid.children].find(({ dataset }) => rank(dataset.metric) > rank(name));
  grid.insertBefore(chart.element, next ?? null);
  seen.observe(chart.element);
  resized.observe(chart.holder);
}

function rank(name) {
  if (FIRST.includes(name)) return "0";
  const place = LAST.indexOf(name);
  return place < 0 ? `1${name}` : `2${String(place).padStart(2, "0")}`;
}

const scheduleDraw = oncePerFrame(drawAll);
const scheduleLoadedDraw = oncePerFrame(drawLoaded);
// Names of the lines that came since they were last drawn.
const loaded = new Set();
let loadedTimer = null;
let drawnRange = null;
let drawMs = 0;

// Of twenty long runs many lines come one after the other, and each drawing is one of all runs: a fifth of the time
// at most goes to that.
function scheduleLoaded({ name }) {
  loaded.add(name);
  loadedTimer ??= setTimeout(() => {
    loadedTimer = null;
    scheduleLoadedDraw();
  }, Math.max(LOADED_MS, 4 * drawMs));
}

// Only where something came, unless all charts have to move.
function drawLoaded() {
  const range = currentRange();
  const isMoved = options.axis === "tokens" || String(range) !== String(drawnRange);
  draw([...charts.values()].filter((chart) => isMoved || chart.names.some((name) => loaded.has(name))), range);
  loaded.clear();
}

function drawAll() {
  draw(charts.values(), currentRange());
}

function draw(shown, range) {
  const began = performance.now();
  showNotes();
  for (const chart of shown) chart.update(range);
  drawnRange = range;
  whole.hidden = !zoom;
  drawMs = performance.now() - began;
  grid.dataset.numHeld = runs.reduce((sum, run) => sum + [...run.lines.values()].filter(({ isHeld }) => isHeld).length, 0);
}

function currentRange() {
  if (options.axis === "tokens") for (const run of runs) run.readTokens();
  if (zoom) return zoom;
  const shown = runs.filter((run) => !run.isHidden && run.isPlacedOn(options.axis));
  const held = shown.flatMap((run) => [...run.lines.values()]);
  return shownRange(held.map(({ series }) => series), [], { axis: options.axis, span: "all" });
}

function rebuildAll() {
  readLooks();
  const range = currentRange();
  for (const chart of charts.values()) {
    chart.range = range;
    chart.rebuild();
  }
}

// Why a run that is not hidden has no line.
function showNotes() {
  runs.forEach((run, place) => {
    const note = keyOf(place).querySelector("[data-key-note]");
    const has = run.names.has("tokens");
    note.textContent = run.names.size === 0 ? "no values yet" : "no count of tokens";
    note.hidden = run.names.size > 0 && (options.axis !== "tokens" || has);
  });
}

// Values ------------------------------------------------------------------------------------------

// In the order of the page; on the axis of tokens their counts come first.
function* wantedLines() {
  if (options.axis === "tokens") yield* runs.filter((run) => !run.isHidden).map((run) => run.line("tokens")).filter(Boolean);
  for (const { dataset } of grid.children) {
    const chart = charts.get(dataset.metric);
    if (chart.isVisible) yield* chart.lines();
  }
}

const loads = new LineLoads({
  next: (running) => {
    for (const line of wantedLines()) if (!running.has(line) && line.isMissing(options, zoom)) return line;
    return null;
  },
  load: (line) => line.load(options, zoom),
  onDone: scheduleLoaded,
  onProblem: showProblem,
});

let refineTimer = null;

function refine() {
  clearTimeout(refineTimer);
  refineTimer = setTimeout(() => loads.pump(), REFINE_MS);
}

function showProblem(error) {
  const element = document.querySelector("[data-chart-problem]");
  element.hidden = error === null;
  if (error) element.textContent = `The charts could not be loaded: ${error.message}. Trying again.`;
}

// What runs do meanwhile --------------------------------------------------------------------------

let pollTimer = null;
let isPolling = false;

async function poll() {
  if (isPolling) return;
  clearTimeout(pollTimer);
  pollTimer = null;
  isPolling = true;
  try {
    const { version } = document.querySelector("[data-part='compare-settings']").dataset;
    await refreshParts(`${panels}&settings=${version}`);
    for (const [place, state] of states().entries()) await keepUp(runs[place], state);
    showState("live");
  } catch (error) {
    if (error.status === 404) location.reload(); // a run is gone, and its column with it
    showState("waiting");
  }
  isPolling = false;
  plan();
}

async function keepUp(run, { seq, isOver }) {
  run.isOver = isOver;
  if (seq - run.cursor > MAX_BEHIND) run.skipTo(seq);
  for (let more = seq > run.cursor; more;) {
    const page = await getJson(`${run.address}/metrics.json?after=${run.cursor}`);
    run.take(page.points, page.cursor);
    more = page.more;
    addCharts();
    loads.pump();
    scheduleDraw();
  }
}

// Once all runs are over nothing is asked any more.
function plan() {
  const isOver = states().every((state, place) => state.isOver && state.seq <= runs[place].cursor);
  document.querySelector("[data-live-state]").hidden = isOver;
  if (!isOver && !document.hidden && pollTimer === null) pollTimer = setTimeout(poll, POLL_MS * (0.9 + 0.2 * Math.random()));
}

// What is shown -----------------------------------------------------------------------------------

function setZoom(from, to) {
  if (from === null && !zoom) return;
  zoom = from === null ? null : [from, to];
  keepInAddress();
  refine();
  scheduleDraw();
}

function keepInAddress() {
  const hidden = [...runs.keys()].filter((place) => runs[place].isHidden);
  history.replaceState(null, "", `${location.pathname}${location.search}${hashOf(options, hidden, zoom)}`);
}

function readAddress() {
  const view = viewOf(location.hash);
  Object.assign(options, view.options);
  zoom = view.zoom;
  showTools(tools, options);
  runs.forEach((run, place) => {
    run.isHidden = view.hidden.includes(place);
    keyOf(place).querySelector("[data-shows]").checked = !run.isHidden;
  });
}

function onWeight() {
  options.weight = Number(tools.elements.weight.value);
  showTools(tools, options);
  keepWeight(options.weight);
  for (const run of runs) run.setWeight(options.weight);
  refine();
  scheduleDraw();
}

function onTool({ target: { name } }) {
  if (name === "weight") {
    keepInAddress();
    return;
  }
  if (name === "axis") zoom = null;
  options.axis = tools.elements.axis.value;
  options.isLog = tools.elements.isLog.checked;
  options.hasValidation = tools.elements.hasValidation.checked;
  keepInAddress();
  loads.pump();
  rebuildAll();
  scheduleDraw();
}

function onShown({ target }) {
  if (!target.matches("[data-shows]")) return;
  runs[target.dataset.shows].isHidden = !target.checked;
  keepInAddress();
  loads.pump();
  scheduleDraw();
}

function onPointer({ target }) {
  const key = target.closest?.("[data-run-key]");
  const run = key ? runs[key.dataset.runKey] : null;
  for (const chart of charts.values()) chart.point(run && !run.isHidden ? run : null);
}

// Kept in the browser, as most people want it the same way everywhere.
function connectDifferences() {
  const box = document.querySelector("[data-differences]");
  try {
    box.checked = localStorage.getItem("compare-all") !== "1";
    box.addEventListener("change", () => localStorage.setItem("compare-all", box.checked ? "0" : "1"));
  } catch {
    // Holds for this page only.
  }
}

// -------------------------------------------------------------------------------------------------

tools.addEventListener("input", ({ target }) => {
  if (target.name === "weight") onWeight();
});
tools.addEventListener("change", onTool);
tools.addEventListener("submit", (event) => event.preventDefault());
tools.querySelector("[data-copy-view]").addEventListener("click", ({ currentTarget }) => {
  keepInAddress();
  currentTarget.dataset.copyText = location.href;
});
whole.addEventListener("click", () => setZoom(null));
keys.addEventListener("change", onShown);
document.addEventListener("pointerover", onPointer);
document.addEventListener("focusin", onPointer);
document.addEventListener("themechange", rebuildAll);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", rebuildAll);
document.addEventListener("visibilitychange", () => {
  if (!document.hidden) poll();
});
addEventListener("hashchange", () => {
  readAddress();
  for (const run of runs) run.setWeight(options.weight);
  loads.pump();
  rebuildAll();
});

readAddress();
readLooks();
connectDifferences();
addCharts();
showState("live");
plan();
onComingBack(poll);
