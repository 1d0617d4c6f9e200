// Loads that are tried again until they succeed: the server may be away just now.
const FIRST_DELAY_MS = 500;
const LONGEST_DELAY_MS = 15_000;

export class Loads {
  #retries = new Map();
  #onChange;

  // `onChange` gets the latest error while anything is missing, and null once nothing is.
  constructor(onChange) {
    this.#onChange = onChange;
  }

  // Resolves after the first try, whatever came of it.
  async add(load, delay = FIRST_DELAY_MS) {
    clearTimeout(this.#retries.get(load));
    try {
      await load();
      this.#retries.delete(load);
      if (!this.#retries.size) this.#onChange(null);
    } catch (error) {
      this.#onChange(error);
      const next = Math.min(2 * delay, LONGEST_DELAY_MS);
      this.#retries.set(load, setTimeout(() => this.add(load, next), delay * (0.5 + Math.random())));
    }
  }
}
