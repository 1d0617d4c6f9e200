// The values of one metric: every one kept in order, smoothed in full, and put into buckets to be drawn.

const NO_PAST = { width: 1, step: [], last_step: [], time_s: [] };

// Where a run went back to an earlier step, the values it left behind are kept apart.
export class Series {
  constructor(name) {
    this.name = name;
    this.weight = 0;
    // Says how many tokens the run had seen at a step; there is no such axis before it is set.
    this.tokensAt = null;
    // The time axis counts seconds from here on; from 0 it is that of the clock.
    this.startsAt = 0;
    this.clear();
  }

  clear() {
    // The past that came in buckets: all of it, and what was asked for last, which may be a finer part of it.
    this.whole = null;
    this.history = null;
    this.asked = null;
    // Its last step, and the latest time of a value that is known of it.
    this.pastEnd = -Infinity;
    this.pastEndTime = -Infinity;
    this.numRewrites = (this.numRewrites ?? 0) + 1;
    this.leftBehind = [];
    this.numValues = 0;
    this.facts = noFacts();
    // The run went back into the past that came in buckets, which must be asked for again.
    this.isOutdated = false;
    this.step = [];
    this.time = [];
    this.value = [];
    this.smooth = [];
    this.average = { numerator: 0, denominator: 0, step: 0 };
  }

  push(step, time, value) {
    this.numValues += 1;
    if (step < this.#lastStep()) this.#goBack(step);
    this.step.push(step);
    this.time.push(time);
    this.value.push(value);
    this.smooth.push(this.#averaged(step, value));
    this.#seeValue(step, value);
  }

  #lastStep() {
    return this.step.at(-1) ?? this.pastEnd;
  }

  #goBack(step) {
    this.numRewrites += 1;
    if (step <= this.pastEnd) this.isOutdated = true;
    const cut = lowerBound(this.step, step);
    if (cut < this.step.length) this.leftBehind.push({ step: this.step.splice(cut), time: this.time.splice(cut), value: this.value.splice(cut) });
    this.setWeight(this.weight);
    this.#seeAgain();
  }

  // De-biased moving average. It decays once per step, so its reach does not depend on how often one records.
  #averaged(step, value) {
    const average = this.average;
    if (Number.isFinite(value)) {
      const decay = average.denominator ? this.weight ** Math.max(step - average.step, 0) : 0;
      average.numerator = average.numerator * decay + value;
      average.denominator = average.denominator * decay + 1;
      average.step = step;
    }
    return average.denominator ? average.numerator / average.denominator : NaN;
  }

  setWeight(weight) {
    this.weight = weight;
    this.average = this.history ? { ...this.history.smoothing } : { numerator: 0, denominator: 0, step: 0 };
    this.smooth = this.step.map((step, index) => this.#averaged(step, this.value[index]));
  }

  // The past up to the page's first cursor, in buckets made by the server: all of it first, later also finer ones
  // between two steps.
  setHistory(history, steps = null) {
    const isFirst = !this.whole;
    if (isFirst) this.numValues += history.num_values.reduce((sum, n) => sum + n, 0) + history.num_abandoned;
    if (isFirst || !steps) this.whole = history;
    this.history = history;
    this.asked = steps;
    this.pastEnd = Math.max(this.pastEnd, history.last_step.at(-1) ?? -Infinity);
    this.pastEndTime = Math.max(this.pastEndTime, history.time_s.at(-1) ?? -Infinity);
    this.setWeight(this.weight);
    if (!isFirst) return;
    this.numRewrites += 1;
    this.#seeAgain();
  }

  // What was left behind when the run went back, each stretch on an axis.
  abandoned(axis) {
    const past = (this.history?.abandoned ?? []).map(({ step, time_s: time, mean }) => ({ step, time, value: mean }));
    return [...past, ...this.leftBehind].map(({ step, time, value }) => ({ x: this.#onAxis(axis, step, time), value }));
  }

  get hasAbandoned() {
    return this.leftBehind.length > 0 || (this.history?.abandoned.length ?? 0) > 0;
  }

  // The places of steps on an axis ("step", "time" or "tokens").
  #onAxis(axis, step, time) {
    if (axis === "time") return this.startsAt ? time.map((moment) => moment - this.startsAt) : time;
    return axis === "tokens" && this.tokensAt ? step.map(this.tokensAt) : step;
  }

  // Where a value of the tail is on an axis.
  #placeAt(axis, index) {
    if (axis === "time") return this.time[index] - this.startsAt;
    const step = this.step[index];
    return axis === "tokens" && this.tokensAt ? this.tokensAt(step) : step;
  }

  get isEmpty() {
    return this.step.length === 0 && !this.whole?.step.length;
  }

  // The extent on an axis, whatever part of the past is held.
  extent(axis) {
    const last = this.step.length - 1;
    const past = this.whole?.step.length ? this.whole : null;
    if (!past && last < 0) return null;
    const first = past ? this.#onAxis(axis, [past.step[0]], [past.time_s[0]])[0] : this.#placeAt(axis, 0);
    return [first, last >= 0 ? this.#placeAt(axis, last) : this.#onAxis(axis, [this.pastEnd], [this.pastEndTime])[0]];
  }

  // Where the first value at a step or after it is on an axis; Infinity after the last one.
  placeOf(axis, step) {
    const past = this.#covering(step, step);
    const index = lowerBound(past?.last_step ?? [], step);
    if (index < (past?.step.length ?? 0)) return this.#onAxis(axis, [past.step[index]], [past.time_s[index]])[0];
    const place = lowerBound(this.step, step);
    return place < this.step.length ? this.#placeAt(axis, place) : Infinity;
  }

  // The first and last step of the past between two places on an axis, at least; null without a past.
  pastSteps(axis, from, to) {
    const past = this.whole;
    if (!past?.step.length) return null;
    if (axis === "step") return [Math.max(Math.floor(from), past.step[0]), Math.min(Math.ceil(to), this.pastEnd)];
    const places = this.#onAxis(axis, past.step, past.time_s);
    const bucketAt = (place) => Math.max(upperBound(places, place) - 1, 0);
    return [past.step[bucketAt(from)], past.last_step[bucketAt(to)]];
  }

  // The past in the finest buckets that are held of all these steps.
  #covering(first, last) {
    if (!this.asked) return this.history;
    return this.asked[0] <= first && last <= this.asked[1] ? this.history : this.whole;
  }

  // What to draw between two places on an axis, in at most `maxPoints` columns.
  view(axis, from, to, maxPoints) {
    const first = Math.max(bound(this.step.length, (index) => this.#placeAt(axis, index) < from) - 1, 0);
    const end = Math.min(bound(this.step.length, (index) => this.#placeAt(axis, index) <= to) + 1, this.step.length);
    if (!this.whole && end - first <= maxPoints) return this.#rawView(axis, first, end);
    const steps = this.pastSteps(axis, from, to);
    const past = steps ? this.#covering(...steps) : NO_PAST;
    return this.#bucketView(axis, past, this.#inside(past, axis, from, to), first, end, maxPoints);
  }

  // The buckets of a past that lie in a range, as [index, place on the axis].
  #inside(past, axis, from, to) {
    const places = this.#onAxis(axis, past.step, past.time_s);
    const inside = [];
    for (let index = 0; index < places.length && places[index] <= to; index += 1) {
      const end = axis === "step" ? past.last_step[index] : places[index + 1] ?? places[index];
      if (end >= from) inside.push([index, places[index]]);
    }
    return inside;
  }

  #rawView(axis, first, end) {
    const view = emptyView();
    for (let index = first; index < end; index += 1) {
      const value = this.value[index];
      const isFinite = Number.isFinite(value);
      const x = this.#placeAt(axis, index);
      view.x.push(x);
      view.step.push(this.step[index]);
      view.mean.push(isFinite ? value : null);
      view.smooth.push(isFinite ? this.smooth[index] : null);
      view.low.push(null);
      view.high.push(null);
      view.numValues.push(1);
      if (!isFinite) view.bad.push([x, 1]);
    }
    return view;
  }

  // Buckets are a power of two wide and start at its multiples, so they stay put as values arrive.
  #bucketView(axis, past, inside, first, end, maxPoints) {
    const buckets = new Buckets(this.#width(past, inside, first, end, maxPoints));
    for (const [index, x] of inside) {
      const numBad = past.num_nonfinite[index];
      buckets.add(past.step[index], x, past.num_values[index] - numBad, numBad,
        past.mean[index], past.low[index], past.high[index], past.smooth[index]);
    }
    for (let index = first; index < end; index += 1) {
      const value = this.value[index];
      const isFinite = Number.isFinite(value);
      buckets.add(this.step[index], this.#placeAt(axis, index), isFinite ? 1 : 0, isFinite ? 0 : 1, value, value, value, this.smooth[index]);
    }
    return buckets.view();
  }

  // The values after the past are not in buckets and may be shown one by one.
  #width(past, inside, first, end, maxPoints) {
    let low = end > first ? this.step[first] : Infinity;
    let high = end > first ? this.step[end - 1] : -Infinity;
    for (const [index] of inside) {
      low = Math.min(low, past.step[index]);
      high = Math.max(high, past.last_step[index]);
    }
    let width = inside.length ? past.width : 1;
    while (high - low > width * maxPoints) width *= 2;
    return width;
  }

  #see(step, low, high, mean, numBad) {
    const facts = this.facts;
    facts.numBad += numBad;
    if (numBad && facts.firstBad === null) facts.firstBad = step;
    if (mean === null) return;
    facts.first ??= mean;
    facts.last = mean;
    if (facts.lowest === null || low < facts.lowest) [facts.lowest, facts.lowestStep] = [low, step];
    if (facts.highest === null || high > facts.highest) [facts.highest, facts.highestStep] = [high, step];
  }

  #seeAgain() {
    this.facts = noFacts();
    const past = this.whole;
    for (let index = 0; past && index < past.step.length; index += 1) {
      this.#see(past.step[index], past.low[index], past.high[index], past.mean[index], past.num_nonfinite[index]);
    }
    if (past) {
      [this.facts.first, this.facts.last] = [past.first_value, past.last_value];
      this.facts.isRough = past.width > 1;
    }
    for (let index = 0; index < this.step.length; index += 1) this.#seeValue(this.step[index], this.value[index]);
  }

  #seeValue(step, value) {
    if (Number.isFinite(value)) this.#see(step, value, value, value, 0);
    else this.#see(step, null, null, null, 1);
  }
}

// What the words under a chart are made of.
function noFacts() {
  return { first: null, last: null, lowest: null, lowestStep: 0, highest: null, highestStep: 0, numBad: 0, firstBad: null, isRough: false };
}

class Buckets {
  constructor(width) {
    this.width = width;
    this.all = [];
    this.current = null;
  }

  add(step, x, numFinite, numBad, mean, low, high, smooth) {
    const number = Math.floor(step / this.width);
    if (this.current?.number !== number) {
      this.current = { number, step, x, numFinite: 0, numBad: 0, sum: 0, low: Infinity, high: -Infinity, smoothSum: 0 };
      this.all.push(this.current);
    }
    const bucket = this.current;
    bucket.numBad += numBad;
    if (!numFinite) return;
    bucket.numFinite += numFinite;
    bucket.sum += mean * numFinite;
    bucket.smoothSum += smooth * numFinite;
    bucket.low = Math.min(bucket.low, low);
    bucket.high = Math.max(bucket.high, high);
  }

  view() {
    const view = emptyView();
    view.width = this.width;
    for (const bucket of this.all) {
      const has = bucket.numFinite > 0;
      view.x.push(bucket.x);
      view.step.push(bucket.step);
      view.mean.push(has ? bucket.sum / bucket.numFinite : null);
      view.smooth.push(has ? bucket.smoothSum / bucket.numFinite : null);
      view.low.push(has ? bucket.low : null);
      view.high.push(has ? bucket.high : null);
      view.numValues.push(bucket.numFinite + bucket.numBad);
      if (bucket.numBad) view.bad.push([bucket.x, bucket.numBad]);
    }
    return view;
  }
}

function emptyView() {
  return { width: 0, x: [], step: [], mean: [], smooth: [], low: [], high: [], numValues: [], bad: [] };
}

// The first index whose value is not below / is above.
export function lowerBound(sorted, value) {
  return bound(sorted.length, (index) => sorted[index] < value);
}

export function upperBound(sorted, value) {
  return bound(sorted.length, (index) => sorted[index] <= value);
}

function bound(length, isBefore) {
  let low = 0;
  let high = length;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (isBefore(middle)) low = middle + 1;
    else high = middle;
  }
  return low;
}
