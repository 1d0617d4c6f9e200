// The runs that are compared: the past of a metric is read once somebody sees it, and what comes later is added.
import { getJson } from "./api.js";
import { Series } from "./series.js";
import { TokenAxis } from "./token_axis.js";

const NUM_BUCKETS = 1000;
// Of a past in buckets: with more values behind it, it is read anew.
const MAX_TAIL = 20_000;
const NUMBERS = { NaN, Infinity, "-Infinity": -Infinity };

// One metric of one run.
export class Line {
  constructor(run, name) {
    this.run = run;
    this.name = name;
    this.series = new Series(name);
    this.hasLeftBehind = false;
    // All values are here one by one, so that nothing else has to be asked for.
    this.isWhole = false;
    this.#startAgain();
  }

  #startAgain() {
    this.turn = (this.turn ?? 0) + 1;
    // The past ends at this seq; null before it is asked for.
    this.upTo = null;
    // What came while it was on its way.
    this.waiting = [];
    // Weight and steps of what is held; null before anything is.
    this.held = null;
  }

  get isHeld() {
    return this.held !== null;
  }

  isMissing(options, range) {
    if (!this.isHeld) return true;
    return !this.isWhole && this.held !== keyOf(options.weight, this.#steps(options, range));
  }

  // What is looked at closely, as steps of the past; null where that is all of it, or nothing.
  #steps({ axis }, range) {
    const steps = range && this.series.pastSteps(axis, ...range);
    return steps && steps[0] <= steps[1] ? steps : null;
  }

  async load(options, range) {
    const { turn, isHeld } = this;
    if (!isHeld) this.upTo = this.run.cursor;
    const steps = isHeld ? this.#steps(options, range) : null;
    const { weight } = options;
    const query = new URLSearchParams({ name: this.name, up_to: this.upTo, weight, buckets: NUM_BUCKETS });
    if (steps) {
      query.set("from", steps[0]);
      query.set("to", steps[1]);
    }
    const { series: [history] } = await getJson(`${this.run.address}/series.json?${query}`);
    if (turn !== this.turn) return; // the run went back meanwhile
    if (isHeld) this.series.setHistory(history, steps);
    else this.#begin(history, options.weight);
    this.held = keyOf(weight, steps);
  }

  #begin(history, weight) {
    const series = new Series(this.name);
    series.startsAt = this.run.startsAt;
    series.tokensAt = this.series.tokensAt;
    series.setWeight(weight);
    this.isWhole = history.width === 1 && history.num_values.every((number) => number === 1);
    this.hasLeftBehind = history.abandoned.length > 0;
    if (this.isWhole) history.step.forEach((step, index) => series.push(step, history.time_s[index], history.mean[index] ?? NaN));
    else series.setHistory(history);
    for (const value of this.waiting) series.push(...value);
    this.waiting = [];
    this.series = series;
  }

  push(step, time, value) {
    if (this.upTo === null) return; // it comes with the past
    if (!this.isHeld) {
      this.waiting.push([step, time, value]);
      return;
    }
    const { series } = this;
    series.push(step, time, value);
    this.hasLeftBehind ||= series.hasAbandoned;
    if (series.isOutdated || (!this.isWhole && series.step.length > MAX_TAIL)) this.#startAgain();
  }

  // What is shown stays until all of the past was read anew.
  reset() {
    this.#startAgain();
  }
}

export class ComparedRun {
  constructor({ id, title, startsAt, names }, { seq, isOver }) {
    this.title = title;
    this.startsAt = startsAt;
    this.address = `/runs/${encodeURIComponent(id)}`;
    this.names = new Set(names);
    this.cursor = seq;
    this.isOver = isOver;
    this.isHidden = false;
    this.look = null;
    this.tokenAxis = new TokenAxis();
    this.lines = new Map();
  }

  // A metric as a line; null where the run has none of that name.
  line(name) {
    if (!this.names.has(name)) return null;
    if (!this.lines.has(name)) this.lines.set(name, new Line(this, name));
    return this.lines.get(name);
  }

  take(points, next) {
    for (const [seq, step, time, name, value] of points) {
      if (seq <= this.cursor) continue;
      this.names.add(name);
      this.line(name).push(step, time, typeof value === "string" ? NUMBERS[value] : value);
    }
    this.cursor = Math.max(this.cursor, next);
  }

  // So much came that it is read in buckets rather than one by one.
  skipTo(seq) {
    this.cursor = seq;
    for (const line of this.lines.values()) line.reset();
  }

  setWeight(weight) {
    for (const { series } of this.lines.values()) series.setWeight(weight);
  }

  // Where each step is on the axis of tokens; without their metric there is no such axis.
  readTokens() {
    const tokens = this.lines.get("tokens");
    if (tokens && !tokens.series.isEmpty) this.tokenAxis.read(tokens.series);
    const tokensAt = this.tokenAxis.isEmpty ? null : this.tokenAxis.at;
    for (const { series } of this.lines.values()) series.tokensAt = tokensAt;
  }

  // How far the run has come on an axis, whatever metric says so.
  endOn(axis) {
    return Math.max(...[...this.lines.values()].map(({ series }) => series.extent(axis)?.[1] ?? -Infinity));
  }

  isPlacedOn(axis) {
    return axis !== "tokens" || !this.tokenAxis.isEmpty;
  }
}

function keyOf(weight, steps) {
  return `${weight} ${steps ?? "all"}`;
}
