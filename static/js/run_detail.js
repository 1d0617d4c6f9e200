// A run's page: its values over HTTP, then over the websocket from the last seq on; each counts once.
import { Ancestors } from "./ancestors.js";
import { getJson, parsePage, replaceParts } from "./api.js";
import { Chart } from "./chart.js";
import { hashOf, showTools, showWeight, showZone, viewOf } from "./chart_view.js";
import { count } from "./format.js";
import { oncePerFrame } from "./frames.js";
import { Loads } from "./loads.js";
import { keepIgnoring } from "./outliers.js";
import { VALIDATION } from "./overlays.js";
import { Panels } from "./run_panels.js";
import { Series } from "./series.js";
import { shownRange } from "./shown_range.js";
import { keepWeight } from "./smoothing.js";
import { connectSteering } from "./steering.js";
import { TokenAxis } from "./token_axis.js";
import { LiveSocket, showState } from "./socket.js";

const settings = JSON.parse(document.getElementById("chart-settings").textContent);
const address = `/runs/${encodeURIComponent(settings.runId)}`;
const panels = new Panels(address);
const grid = document.querySelector("[data-chart-grid]");
const tools = document.querySelector("[data-chart-tools]");
const follow = document.querySelector("[data-follow]");
// As many are held one by one, as many does the server send so (LARGE_RUN_VALUES).
const MAX_LIVE_VALUES = 60_000;
const ORDER = ["loss", "learning_rate", "grad_norm", "tokens_per_s", "step_time_s"];
const NUMBERS = { NaN, Infinity, "-Infinity": -Infinity };

// What all charts show: weight, isLog, ignoresOutliers, axis, span.
const options = {};
const charts = new Map();
// Series that are drawn in the loss chart, by metric name.
const overlays = new Map();
const ancestors = new Ancestors();
let hasAncestors = false;
const tokenAxis = new TokenAxis();
let cursor = settings.isLarge ? settings.upToSeq : -1;
let zoom = null;
let numMissed = 0;
let numValues = 0;
// Those of them that are held one by one.
let numLive = 0;
// The past is being read anew, and the charts stay as they are until it is there.
let isRestarting = false;

// Values ------------------------------------------------------------------------------------------

function takePoints(points, next) {
  let numNew = 0;
  for (const [seq, step, time, name, value] of points) {
    if (seq <= cursor) continue;
    seriesOf(name).push(step, time, typeof value === "string" ? NUMBERS[value] : value);
    numNew += 1;
  }
  cursor = Math.max(cursor, next);
  numValues += numNew;
  numLive += numNew;
  grid.dataset.numValues = numValues;
  grid.dataset.cursor = cursor;
  if (!numNew) return;
  if (numLive > MAX_LIVE_VALUES || allSeries().some((series) => series.isOutdated)) restart();
  if (zoom) numMissed += numNew;
  scheduleDraw();
}

async function loadPast() {
  if (settings.isLarge) await loadHistory();
  for (let more = !settings.isLarge; more;) {
    const page = await getJson(`${address}/metrics.json?after=${cursor}`);
    takePoints(page.points, page.cursor);
    more = page.more;
  }
  document.querySelector("[data-chart-empty]").hidden = charts.size > 0;
}

// A long past comes in buckets, first all of it: a closer look asks for finer ones.
async function loadHistory() {
  historyTurn += 1;
  const turn = historyTurn;
  const names = [...settings.names].sort((a, b) => (rank(a) < rank(b) ? -1 : 1));
  const missing = names.filter((name) => !knownSeries(name)?.whole);
  for (const name of missing) if (!(await loadHistoryOf(name, null, turn))) return;
  isRestarting = false;
  scheduleDraw();
  const range = closerRange();
  for (const name of range ? names : names.filter((one) => !missing.includes(one))) {
    if (!(await loadHistoryOf(name, range, turn))) return;
  }
}

// Returns false when overtaken: another range is wanted by now, or the run went back.
async function loadHistoryOf(name, range, turn) {
  const query = new URLSearchParams({ name, up_to: settings.upToSeq, weight: options.weight, buckets: 1500 });
  const steps = range && seriesOf(name).pastSteps(options.axis, ...range);
  if (steps) {
    query.set("from", steps[0]);
    query.set("to", steps[1]);
  }
  const { series: [history] } = await getJson(`${address}/series.json?${query}`);
  if (turn !== historyTurn) return false;
  const series = seriesOf(name);
  const before = series.numValues;
  series.setHistory(history, steps);
  numValues += series.numValues - before;
  grid.dataset.numValues = numValues;
  scheduleDraw();
  return true;
}

// All of the past is asked for again in buckets, up to now: the run went back into it, or too much came since.
function restart() {
  for (const series of allSeries()) series.clear();
  settings.isLarge = true;
  settings.upToSeq = cursor;
  settings.names = [...charts.keys(), ...overlays.keys()];
  numValues = 0;
  numLive = 0;
  isRestarting = true;
  loads.add(loadHistory);
}

async function loadAncestors() {
  await ancestors.load(address, options.weight);
  for (const [name, chart] of charts) chart.ancestors = ancestors.of(name);
  scheduleDraw();
}

// A client makes a run and has it load a checkpoint: it becomes a fork while its page is open.
function lookForAncestors({ dataset }) {
  if (hasAncestors || !("continues" in dataset)) return;
  hasAncestors = true;
  loads.add(loadAncestors);
}

const loads = new Loads(showProblem);
let historyTimer = null;
let historyTurn = 0;

function refineHistory() {
  if (!settings.isLarge) return;
  clearTimeout(historyTimer);
  historyTimer = setTimeout(() => loads.add(loadHistory), 200);
}

// Charts ------------------------------------------------------------------------------------------

const seen = new IntersectionObserver((entries) => {
  for (const { target, isIntersecting } of entries) {
    const chart = charts.get(target.dataset.metric);
    chart.isVisible = isIntersecting;
    if (isIntersecting && chart.isStale) scheduleDraw();
  }
}, { rootMargin: "300px" });

const resized = new ResizeObserver((entries) => {
  for (const { target } of entries) charts.get(target.closest("[data-metric]").dataset.metric)?.resize();
});

function knownSeries(name) {
  return name.startsWith(VALIDATION) ? overlays.get(name) : charts.get(name)?.series;
}

function seriesOf(name) {
  if (!name.startsWith(VALIDATION)) return chartOf(name).series;
  const known = overlays.get(name);
  if (known) return known;
  const series = new Series(name);
  overlays.set(name, series);
  const label = name.slice(VALIDATION.length + 1);
  chartOf("loss").addOverlay(label ? `validation: ${label}` : "validation", series);
  return series;
}

function allSeries() {
  return [...[...charts.values()].map(({ series }) => series), ...overlays.values()];
}

function chartOf(name) {
  const known = charts.get(name);
  if (known) return known;
  const series = new Series(name);
  series.setWeight(options.weight);
  const chart = new Chart(series, options, { onZoom: setZoom, onReset: resetZoom, onShowAll: showOutliers });
  chart.ancestors = ancestors.of(name);
  charts.set(name, chart);
  if (name === "loss") chart.setMarks(readMarks());
  const place = rank(name);
  const next = [...grid.children].find((element) => rank(element.dataset.metric) > place);
  grid.insertBefore(chart.element, next ?? null);
  document.querySelector("[data-chart-empty]").hidden = true;
  seen.observe(chart.element);
  resized.observe(chart.holder);
  return chart;
}

function rank(name) {
  const place = ORDER.indexOf(name);
  return place < 0 ? `9${name}` : `${place}`;
}

const scheduleDraw = oncePerFrame(drawAll);

function drawAll() {
  if (isRestarting) return;
  readTokens();
  const range = currentRange();
  for (const chart of charts.values()) chart.update(range);
  showZone(tools, options.axis, range);
  follow.hidden = !zoom;
  follow.textContent = numMissed ? `${count(numMissed)} new values \u2013 follow` : "Follow";
}

function currentRange() {
  // The tokens and the time of ancestors are not this run's.
  return zoom ?? shownRange(allSeries(), options.axis === "step" ? ancestors.all : [], options);
}

// What is looked at closely, null where all is shown.
function closerRange() {
  if (!zoom && options.span === "all") return null;
  readTokens();
  return currentRange();
}

// Where each step is on the axis of tokens; without their metric there is no such axis.
function readTokens() {
  const tokens = charts.get("tokens")?.series;
  tools.elements.axis.options[1].disabled = !tokens;
  if (options.axis !== "tokens") return;
  if (tokens) tokenAxis.read(tokens);
  for (const series of allSeries()) series.tokensAt = tokens && !tokenAxis.isEmpty ? tokenAxis.at : null;
}

function setZoom(from, to) {
  look([from, to]);
}

function resetZoom() {
  if (zoom) look(null);
}

function look(range) {
  zoom = range;
  numMissed = 0;
  keepInAddress();
  refineHistory();
  scheduleDraw();
}

// What is shown --------------------------------------------------------------------------------------

function keepInAddress() {
  history.replaceState(null, "", `${location.pathname}${location.search}${hashOf(options, zoom)}`);
}

function take({ zoom: shown, ...others }) {
  Object.assign(options, others);
  zoom = shown;
  showTools(tools, options);
}

// An address that is pasted over this one, or gone back to, differs in its hash alone.
function onHash() {
  const view = viewOf(location.hash);
  if (!view) return;
  take(view);
  numMissed = 0;
  smooth();
  redraw();
}

function onWeight() {
  const was = options.weight;
  options.weight = Number(tools.elements.weight.value);
  showWeight(tools, options.weight);
  keepWeight(options.weight);
  smooth();
  if ((was > 0) !== (options.weight > 0)) rebuildAll();
  refineHistory();
  scheduleDraw();
}

function smooth() {
  for (const series of [...allSeries(), ...ancestors.all]) series.setWeight(options.weight);
}

function onTool(event) {
  if (event.target.name === "weight") {
    keepInAddress();
    return;
  }
  if (event.target.name === "axis") zoom = null;
  options.axis = tools.elements.axis.value;
  options.span = tools.elements.span.value;
  options.isLog = tools.elements.isLog.checked;
  options.ignoresOutliers = tools.elements.ignoresOutliers.checked;
  if (event.target.name === "ignoresOutliers") keepIgnoring(options.ignoresOutliers);
  if (event.target.name === "span") zoom = null;
  keepInAddress();
  redraw();
}

function showOutliers() {
  tools.elements.ignoresOutliers.click();
}

function redraw() {
  refineHistory();
  rebuildAll();
  scheduleDraw();
}

function rebuildAll() {
  const range = currentRange();
  for (const chart of charts.values()) {
    chart.range = range;
    chart.rebuild();
  }
}

function showProblem(error) {
  const element = document.querySelector("[data-chart-problem]");
  element.hidden = error === null;
  if (error) element.textContent = `The charts could not be loaded: ${error.message}. Trying again.`;
}

// The rest of the page --------------------------------------------------------------------------------

function readMarks() {
  return JSON.parse(document.getElementById("run-marks").dataset.marks);
}

async function copyView(button) {
  keepInAddress();
  button.dataset.copyText = location.href;
}

function onMessage({ points, cursor: next, changed, facts, version }) {
  takePoints(points, next);
  if (facts) replaceParts(parsePage(facts));
  if (changed || panels.isOutdated(version)) panels.refresh();
}

// ----------------------------------------------------------------------------------------------------

tools.addEventListener("input", (event) => {
  if (event.target.name === "weight") onWeight();
});
tools.addEventListener("change", onTool);
tools.querySelector("[data-copy-view]").addEventListener("click", (event) => copyView(event.currentTarget));
tools.addEventListener("submit", (event) => event.preventDefault());
follow.addEventListener("click", resetZoom);
addEventListener("hashchange", onHash);
document.addEventListener("themechange", rebuildAll);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", rebuildAll);
document.addEventListener("partchange", ({ target }) => {
  if (target.dataset.part === "events") charts.get("loss")?.setMarks(readMarks());
  if (target.dataset.part === "lineage") lookForAncestors(target);
});
connectSteering(document.querySelector("[data-part='steering']"), () => panels.refreshNow());

take(viewOf(location.hash) ?? viewOf(""));
await loads.add(loadPast);
lookForAncestors(document.querySelector("[data-part='lineage']"));
new LiveSocket(`/ws/runs/${encodeURIComponent(settings.runId)}/`, {
  hello: () => ({ after: cursor }),
  onMessage,
  onState: showState,
});
