// Reads what lines lack, a few at a time so that others get answers, too, and again after the server was away.
const AT_ONCE = 2;
const FIRST_DELAY_MS = 500;
const LONGEST_DELAY_MS = 15_000;

export class LineLoads {
  #next;
  #load;
  #onDone;
  #onProblem;
  #running = new Set();
  #delay = FIRST_DELAY_MS;
  #timer = null;

  // `next` gives the line that is wanted most of those that are not in a set; `onDone` gets each, come or not,
  // `onProblem` an error, null when it is over.
  constructor({ next, load, onDone, onProblem }) {
    this.#next = next;
    this.#load = load;
    this.#onDone = onDone;
    this.#onProblem = onProblem;
  }

  pump() {
    while (this.#timer === null && this.#running.size < AT_ONCE) {
      const line = this.#next(this.#running);
      if (!line) return;
      this.#run(line);
    }
  }

  async #run(line) {
    this.#running.add(line);
    try {
      await this.#load(line);
      this.#delay = FIRST_DELAY_MS;
      this.#onProblem(null);
    } catch (error) {
      this.#onProblem(error);
      this.#rest();
    }
    this.#running.delete(line);
    this.#onDone(line);
    this.pump();
  }

  #rest() {
    if (this.#timer !== null) return;
    this.#timer = setTimeout(() => {
      this.#timer = null;
      this.pump();
    }, this.#delay * (0.5 + Math.random()));
    this.#delay = Math.min(2 * this.#delay, LONGEST_DELAY_MS);
  }
}
