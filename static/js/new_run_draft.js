// The draft of a new run: what was typed, kept in this tab until the run starts.
export class Draft {
  #key;
  #dataset;

  // `dataset` is the one that the page was opened with, if any: of a draft that was made without it all but its own is taken.
  constructor(key, dataset) {
    this.#key = key;
    this.#dataset = dataset;
  }

  keep(values) {
    try {
      sessionStorage.setItem(this.#key, JSON.stringify({ values, openedWith: this.#dataset }));
    } catch {
      // Without storage there is no draft.
    }
  }

  drop() {
    try {
      sessionStorage.removeItem(this.#key);
    } catch {
      // There is none.
    }
  }

  // The values by place, null without a draft.
  read() {
    let draft = null;
    try {
      draft = JSON.parse(sessionStorage.getItem(this.#key));
    } catch {
      // None that can be read.
    }
    if (!draft?.values) return null;
    if (!this.#dataset || draft.openedWith === this.#dataset) return draft.values;
    return { ...draft.values, dataset: [this.#dataset] };
  }
}
