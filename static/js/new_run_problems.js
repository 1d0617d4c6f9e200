// The box over the form of a new run that says why it does not start.
import { sentence } from "./new_run_fields.js";

export class ProblemBox {
  #fields;
  #box = document.querySelector("[data-problems]");
  #list = this.#box.querySelector("[data-problem-list]");

  constructor(fields) {
    this.#fields = fields;
  }

  get isShown() {
    return !this.#box.hidden;
  }

  // What it says already is not said again: it would be read out once more.
  show(problems) {
    const items = problems.map((problem) => this.#asItem(problem));
    const texts = (list) => list.map(({ textContent }) => textContent).join("\n");
    if (texts(items) !== texts([...this.#list.children])) {
      this.#box.querySelector("[data-problems-head]").textContent =
        items.length === 1 ? "The run cannot start like this:" : `The run cannot start like this, ${items.length} things are wrong:`;
      this.#list.replaceChildren(...items);
    }
    this.#box.hidden = items.length === 0;
  }

  focus() {
    this.#box.focus();
  }

  #asItem({ place, message }) {
    const item = document.createElement("li");
    const name = this.#fields.wrapper(place)?.closest(".setting").querySelector(".setting-label")?.textContent.trim() ?? place;
    if (name) {
      const strong = document.createElement("strong");
      strong.textContent = name;
      item.append(strong, ": ", message);
    } else {
      item.append(sentence(message));
    }
    return item;
  }
}
