// The curves of the runs that a run goes on from; its own first value may come later.
import { getJson } from "./api.js";
import { VALIDATION } from "./overlays.js";
import { Series } from "./series.js";

export class Ancestors {
  #lines = new Map();

  // Those that belong in a chart, by its name.
  of(name) {
    return this.#lines.get(name) ?? [];
  }

  get all() {
    return [...this.#lines.values()].flat();
  }

  async load(address, weight) {
    const { ancestors } = await getJson(`${address}/ancestry.json`);
    for (const past of ancestors.flatMap(({ series }) => series)) {
      const name = past.name === VALIDATION ? "loss" : past.name;
      this.#lines.set(name, [...this.of(name), lineOf(past, weight)]);
    }
  }
}

function lineOf(past, weight) {
  const line = new Series(past.name);
  line.setWeight(weight);
  past.step.forEach((step, index) => line.push(step, past.time_s[index], past.mean[index] ?? NaN));
  return line;
}
