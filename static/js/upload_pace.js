// How fast an upload is, by its last seconds, and how long the rest takes at that speed.
const WINDOW_MS = 8000;
const SHORTEST_MS = 500;

export class Pace {
  #samples = [];

  add(bytes, now) {
    this.#samples.push({ bytes, now });
    while (this.#samples.length > 2 && now - this.#samples[0].now > WINDOW_MS) this.#samples.shift();
  }

  // Bytes a second, null until there is something to go by.
  speed() {
    const first = this.#samples[0];
    const last = this.#samples.at(-1);
    if (!first || last.now - first.now < SHORTEST_MS) return null;
    return ((last.bytes - first.bytes) / (last.now - first.now)) * 1000;
  }

  secondsFor(bytes) {
    const speed = this.speed();
    return speed ? bytes / speed : null;
  }
}
