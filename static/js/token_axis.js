// How many tokens a run had trained on at a step: the x axis "tokens".
export class TokenAxis {
  constructor() {
    this.series = null;
    this.#clear();
  }

  #clear() {
    this.numRewrites = this.series?.numRewrites;
    this.numRead = 0;
    this.steps = [0];
    this.totals = [0];
  }

  // Reads on in the series of tokens per step; a long past has them as the mean of each bucket.
  read(series) {
    if (series !== this.series || series.numRewrites !== this.numRewrites) {
      this.series = series;
      this.#clear();
      this.#readPast(series.whole);
    }
    for (; this.numRead < series.step.length; this.numRead += 1) {
      const value = series.value[this.numRead];
      this.#add(series.step[this.numRead], Number.isFinite(value) ? value : 0);
    }
  }

  #readPast(past) {
    for (let index = 0; past && index < past.step.length; index += 1) {
      const number = past.num_values[index] - past.num_nonfinite[index];
      this.#add(past.last_step[index], (past.mean[index] ?? 0) * number);
    }
  }

  #add(step, number) {
    const total = this.totals.at(-1) + number;
    if (step > this.steps.at(-1)) {
      this.steps.push(step);
      this.totals.push(total);
    } else {
      this.totals[this.totals.length - 1] = total;
    }
  }

  get isEmpty() {
    return this.steps.length < 2;
  }

  // A step between two known ones lies between their totals.
  at = (step) => {
    const { steps, totals } = this;
    let low = 0;
    let high = steps.length - 1;
    if (step >= steps[high]) return totals[high];
    while (high - low > 1) {
      const middle = (low + high) >> 1;
      if (steps[middle] <= step) low = middle;
      else high = middle;
    }
    const share = Math.max(step - steps[low], 0) / (steps[high] - steps[low]);
    return totals[low] + share * (totals[high] - totals[low]);
  };
}
