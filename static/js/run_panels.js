// The parts of a run's page beside its charts: read again when something changed, not too often and only while somebody looks.
import { refreshParts } from "./api.js";

const INTERVAL_MS = 3000;

export class Panels {
  #address;
  #timer = null;
  #readAt = performance.now();

  constructor(address) {
    this.#address = address;
    document.addEventListener("visibilitychange", () => {
      if (!document.hidden) this.refresh();
    });
  }

  refresh() {
    const wait = Math.max(0, this.#readAt + INTERVAL_MS - performance.now());
    this.#timer ??= setTimeout(() => this.refreshNow(), wait);
  }

  async refreshNow() {
    clearTimeout(this.#timer);
    this.#timer = null;
    this.#readAt = performance.now();
    if (document.hidden) return;
    try {
      const { version } = document.querySelector("[data-part='checkpoints']").dataset;
      await refreshParts(`${this.#address}/panels/?checkpoints=${version}`);
    } catch {
      // The next change tries again.
    }
  }

  // Another word than that of what is shown: something changed of which no message told.
  isOutdated(version) {
    return version !== undefined && version !== document.querySelector("[data-part='version']").dataset.version;
  }
}
