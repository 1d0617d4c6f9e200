// Reads the page's parts again when somebody comes back to it, and while one of them is busy and somebody looks.
import { refreshParts } from "./api.js";
import { onComingBack } from "./coming_back.js";

const INTERVAL_MS = 1000;
const AFTER_ERROR_MS = 4000;

export class Polling {
  #timer = null;

  constructor() {
    document.addEventListener("visibilitychange", () => this.#plan(0));
    this.#plan(INTERVAL_MS);
    onComingBack(() => this.now());
  }

  async now() {
    clearTimeout(this.#timer);
    let delay = INTERVAL_MS;
    try {
      await refreshParts(location.pathname + location.search);
    } catch {
      delay = AFTER_ERROR_MS;
    }
    this.#plan(delay);
  }

  #plan(delay) {
    clearTimeout(this.#timer);
    if (document.hidden || !document.querySelector("[data-busy]")) return;
    this.#timer = setTimeout(() => this.now(), delay);
  }
}
