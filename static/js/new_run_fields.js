// The fields of a new run: read and filled by place, marked where they differ from where they started.

// Lists that always end with one empty field, up to their maximum.
export class Growing {
  constructor(container) {
    this.container = container;
    this.max = Number(container.dataset.max);
    this.blank = (container.lastElementChild ?? container.firstElementChild).cloneNode(true);
    clear(this.blank);
    container.addEventListener("input", () => this.grow());
    this.grow();
  }

  get fields() {
    return [...this.container.children];
  }

  grow() {
    const last = this.fields.at(-1);
    if (last?.value.trim() && this.fields.length < this.max) this.container.append(this.blank.cloneNode(true));
    this.fields.forEach((field, index) => {
      if (field.nodeName !== "TEXTAREA") return;
      field.setAttribute("aria-label", field.value.trim() ? `Prompt ${index + 1}` : "Another prompt");
      if (index > 0) field.placeholder = "Another prompt";
    });
  }

  offer(options) {
    for (const field of [...this.fields, this.blank]) offer(field, options);
  }

  fill(texts) {
    while (this.fields.length > 1) this.container.lastElementChild.remove();
    clear(this.fields[0]);
    for (const text of texts.slice(0, this.max)) {
      setText(this.fields.at(-1), text);
      this.grow();
    }
  }
}

function clear(field) {
  if (field.nodeName === "SELECT") field.selectedIndex = 0;
  else field.value = "";
  unmark(field);
}

// What is chosen stays, though it is offered no more; so does the first choice, which is none.
function offer(select, options) {
  const { value, selectedOptions: [chosen] } = select;
  const fresh = options.map((option) => new Option(option.text, option.value));
  if (value && !fresh.some((option) => option.value === value)) fresh.push(chosen);
  select.replaceChildren(select.options[0], ...fresh);
  select.value = value;
}

// A field that is wrong is described by what is wrong with it.
function mark(field, note) {
  field.setAttribute("aria-invalid", "true");
  field.setAttribute("aria-describedby", [note.id, ...othersOf(field, note.id)].join(" "));
}

function unmark(field) {
  field.removeAttribute("aria-invalid");
  const others = othersOf(field).filter((id) => !id.endsWith("-error"));
  if (others.length) field.setAttribute("aria-describedby", others.join(" "));
  else field.removeAttribute("aria-describedby");
}

function othersOf(field, id = "") {
  return (field.getAttribute("aria-describedby") ?? "").split(" ").filter((other) => other && other !== id);
}

// A choice may name a version of a dataset that is not among the newest.
function setText(field, text) {
  if (field.nodeName === "SELECT" && ![...field.options].some(({ value }) => value === text)) field.add(new Option(text, text));
  field.value = text;
}

export class Fields {
  constructor(form) {
    this.form = form;
    this.growing = new Map();
    for (const container of form.querySelectorAll("[data-growing]")) {
      this.growing.set(container.closest("[data-field]").dataset.field, new Growing(container));
    }
  }

  // Every value by place, as the server's forms have them.
  read() {
    const values = {};
    for (const [place, text] of new FormData(this.form)) {
      if (place === "csrfmiddlewaretoken") continue;
      (values[place] ??= []).push(text);
    }
    for (const place of this.growing.keys()) values[place] = (values[place] ?? []).filter((text) => text.trim());
    return values;
  }

  fill(values) {
    for (const [place, texts] of Object.entries(values)) this.fillOne(place, texts);
  }

  fillOne(place, texts) {
    if (this.growing.has(place)) {
      this.growing.get(place).fill(texts);
      return;
    }
    for (const field of this.form.querySelectorAll(`[name="${CSS.escape(place)}"]`)) {
      if (field.disabled || field.type === "hidden") continue;
      if (field.type === "radio") field.checked = field.value === texts.at(-1);
      else if (field.type === "checkbox") field.checked = texts.at(-1) === "true";
      else setText(field, texts.at(-1) ?? "");
    }
  }

  // A word for the datasets that are offered, as the server has it.
  get offered() {
    return this.form.elements.namedItem("dataset").dataset.offer;
  }

  // Takes over the datasets that a fresh copy of the page offers.
  offerDatasets(page) {
    const fresh = page.querySelector("select[name='dataset']");
    const [, ...options] = fresh.options;
    const select = this.form.elements.namedItem("dataset");
    offer(select, options);
    select.dataset.offer = fresh.dataset.offer;
    this.growing.get("validation.datasets").offer(options);
    document.getElementById("f-dataset-why").replaceWith(page.getElementById("f-dataset-why"));
  }

  wrapper(place) {
    return this.form.querySelector(`[data-field="${CSS.escape(place.replace(/\[.*$/, ""))}"]`);
  }

  // Marks what differs from where it started; returns how many of them lie under an element.
  markChanged(folded) {
    const values = this.read();
    let numFolded = 0;
    for (const wrapper of this.form.querySelectorAll("[data-field][data-base]")) {
      const place = wrapper.dataset.field;
      if (wrapper.querySelector("input:disabled:not([type='hidden']), select:disabled")) continue;
      const isChanged = !isSame(values[place] ?? [], JSON.parse(wrapper.dataset.base));
      wrapper.classList.toggle("is-changed", isChanged);
      const reset = wrapper.querySelector("[data-reset]");
      if (reset) reset.hidden = !isChanged;
      if (isChanged && folded.contains(wrapper)) numFolded += 1;
    }
    return numFolded;
  }

  reset(wrapper) {
    this.fillOne(wrapper.dataset.field, JSON.parse(wrapper.dataset.base));
  }

  // Shows messages at their fields; `isWanted` chooses those that somebody should see already. Returns the others.
  showProblems(problems, isWanted) {
    for (const note of this.form.querySelectorAll("[data-error]")) {
      note.hidden = true;
      note.textContent = ""; // hidden or not, it describes what names it
    }
    for (const field of this.form.querySelectorAll("[aria-invalid]")) unmark(field);
    return problems.filter(({ place, message }) => !this.showProblem(place, message, isWanted));
  }

  showProblem(place, message, isWanted) {
    const wrapper = this.wrapper(place);
    const note = wrapper?.querySelector("[data-error]") ?? wrapper?.closest("[data-length]")?.querySelector("[data-error]");
    if (!note) return false;
    if (!isWanted(wrapper.dataset.field)) return true;
    note.textContent = note.hidden ? sentence(message) : `${note.textContent} ${sentence(message)}`;
    note.hidden = false;
    const input = this.inputOf(place);
    if (input) mark(input, note);
    return true;
  }

  inputOf(place) {
    const list = this.growing.get(place.replace(/\[.*$/, ""));
    if (list) return list.fields.filter(({ value }) => value.trim())[Number(/\[(\d+)\]/.exec(place)?.[1] ?? 0)] ?? list.fields[0];
    return [...this.form.querySelectorAll(`[name="${CSS.escape(place)}"]`)].find(({ type }) => type !== "hidden");
  }

  // Leads to the first field that is marked, unfolding what hides it.
  focusFirstProblem() {
    const field = this.form.querySelector("[aria-invalid='true']");
    if (!field) return false;
    const folded = field.closest("details");
    if (folded) folded.open = true;
    field.focus();
    return true;
  }
}

function isSame(texts, base) {
  const [one, other] = [texts, base].map((list) => list.filter((text) => text !== ""));
  // A hidden "false" goes before a checked "true".
  if (one.length && one.every((text) => text === "true" || text === "false")) return one.at(-1) === (other.at(-1) ?? "false");
  return one.length === other.length && one.every((text, index) => text.trim() === other[index].trim());
}

export function sentence(text) {
  const first = text.charAt(0).toUpperCase() + text.slice(1);
  return /[.!?]$/.test(first) ? first : `${first}.`;
}
