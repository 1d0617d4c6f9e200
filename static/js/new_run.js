// The form of a new run: previewed while it is typed, kept as a draft, sent with all problems shown at once.
import { parsePage, postForm } from "./api.js";
import { Fields, sentence } from "./new_run_fields.js";
import { connectDialogs } from "./new_run_files.js";

const DEBOUNCE_MS = 300;
const REPEAT_MS = 15_000;

const form = document.querySelector("[data-new-run]");
// Fields named "dataset" and "length" hide the properties of that name.
const lengthChoice = form.elements.namedItem("length");
const fields = new Fields(form);
const folded = document.querySelector("[data-more]");
const card = document.querySelector("[data-preview]");
const summary = document.querySelector("[data-summary]");
const startButton = document.querySelector("[data-start]");
const initial = fields.read();
const touched = new Set();
let wasSent = document.querySelector("[data-problem-list]").childElementCount > 0;
let timer = null;
let newest = 0;
let isStarting = false;

// -- what the form comes to ----------------------------------------------------------------------------------

function changed() {
  const num = fields.markChanged(folded);
  const badge = document.querySelector("[data-num-changed]");
  badge.textContent = `${num} changed`;
  badge.hidden = num === 0;
}

// What is on its way already speaks of the form as it was.
function schedule(delay = DEBOUNCE_MS) {
  newest += 1;
  clearTimeout(timer);
  timer = setTimeout(preview, delay);
}

async function preview() {
  const mine = ++newest;
  clearTimeout(timer);
  timer = null;
  try {
    const { answer } = await postForm(form.getAttribute("data-preview-url") + location.search, new FormData(form));
    if (mine === newest) apply(answer);
  } catch {
    if (mine === newest) card.classList.add("is-stale");
  }
  // What was typed meanwhile has planned a preview of its own, which is sooner.
  timer ??= setTimeout(() => (document.hidden ? schedule(REPEAT_MS) : preview()), REPEAT_MS);
}

function apply({ html, summary: text, problems, rules, num_steps: steps, num_epochs: epochs }) {
  const isGood = problems.length === 0;
  card.classList.toggle("is-stale", !isGood);
  if (isGood) {
    const fresh = parsePage(html).querySelector(".preview-list");
    const body = card.querySelector("[data-preview-body]");
    if (!body.firstElementChild?.isEqualNode(fresh)) body.replaceChildren(document.adoptNode(fresh));
  }
  summary.textContent = isGood ? text : shortProblem(problems);
  fields.showProblems(problems, (place) => wasSent || touched.has(place));
  for (const [place, value] of Object.entries(rules)) {
    const wrapper = fields.wrapper(place);
    const rule = wrapper?.querySelector("[data-rule]");
    if (!rule) continue;
    rule.textContent = `${value}, ${(rule.dataset.words ??= rule.textContent)}`;
    wrapper.querySelector("input").placeholder = value;
  }
  followLength(steps, epochs);
}

function shortProblem(problems) {
  if (!wasSent && problems.every(({ place }) => !touched.has(place))) return "Choose a dataset";
  return problems.length === 1 ? "1 setting to put right" : `${problems.length} settings to put right`;
}

// The length that was not chosen shows what the chosen one comes to.
function followLength(steps, epochs) {
  const isSteps = lengthChoice.value === "steps";
  const follower = isSteps ? form.elements.num_epochs : form.elements.num_steps;
  if (document.activeElement !== follower) follower.value = isSteps ? epochs : steps;
}

// -- draft ---------------------------------------------------------------------------------------------------

const draftKey = form.getAttribute("data-draft-key");

function keepDraft() {
  try {
    sessionStorage.setItem(draftKey, JSON.stringify(fields.read()));
  } catch {
    // Without storage there is no draft.
  }
}

function dropDraft() {
  try {
    sessionStorage.removeItem(draftKey);
  } catch {
    // There is none.
  }
}

function restoreDraft() {
  let draft = null;
  try {
    draft = JSON.parse(sessionStorage.getItem(draftKey));
  } catch {
    // None that can be read.
  }
  if (!draft || wasSent || JSON.stringify(draft) === JSON.stringify(initial)) return;
  fields.fill(draft);
  document.querySelector("[data-draft-note]").hidden = false;
}

document.querySelector("[data-discard]").addEventListener("click", () => {
  dropDraft();
  fields.fill({ ...Object.fromEntries([...fields.growing.keys()].map((place) => [place, []])), ...initial });
  touched.clear();
  document.querySelector("[data-draft-note]").hidden = true;
  changed();
  preview();
  form.elements.namedItem("dataset").focus();
});

// -- typing and sending --------------------------------------------------------------------------------------

form.addEventListener("input", (event) => {
  const { name } = event.target;
  if (name === "num_epochs" || name === "num_steps") lengthChoice.value = name.slice(4);
  touched.add(name);
  keepDraft();
  changed();
  schedule();
});

form.addEventListener("click", (event) => {
  const reset = event.target.closest("[data-reset]");
  if (!reset) return;
  const wrapper = reset.closest("[data-field]");
  fields.reset(wrapper);
  fields.inputOf(wrapper.dataset.field)?.focus();
  keepDraft();
  changed();
  schedule(0);
});

form.addEventListener("submit", (event) => {
  if (event.submitter?.matches("[data-download]")) return;
  event.preventDefault();
  start();
});

document.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey) && !document.querySelector("dialog[open]")) {
    event.preventDefault();
    start();
  }
});

// Back from the run that was started: the page is as it was left, and starts the next one.
addEventListener("pageshow", (event) => {
  if (event.persisted) mayStart();
});

function mayStart() {
  isStarting = false;
  startButton.removeAttribute("aria-disabled");
}

async function start() {
  if (isStarting) return;
  isStarting = true;
  wasSent = true;
  startButton.setAttribute("aria-disabled", "true");
  try {
    const { isDone, answer } = await postForm(form.action, new FormData(form));
    if (isDone) {
      dropDraft();
      location.assign(answer.url);
      return;
    }
    showRefusal(answer.problems ?? [{ place: "", message: answer.detail }]);
  } catch (error) {
    showRefusal([{ place: "", message: error.message }]);
  }
  mayStart();
}

function showRefusal(problems) {
  newest += 1; // a preview on its way knows less
  fields.showProblems(problems, () => true);
  const box = document.querySelector("[data-problems]");
  box.querySelector("[data-problems-head]").textContent =
    problems.length === 1 ? "The run cannot start like this:" : `The run cannot start like this, ${problems.length} things are wrong:`;
  document.querySelector("[data-problem-list]").replaceChildren(...problems.map(asItem));
  box.hidden = false;
  card.classList.add("is-stale");
  summary.textContent = shortProblem(problems);
  if (!fields.focusFirstProblem()) box.focus();
}

function asItem({ place, message }) {
  const item = document.createElement("li");
  const name = fields.wrapper(place)?.querySelector(".setting-label")?.textContent.trim() ?? place;
  if (name) {
    const strong = document.createElement("strong");
    strong.textContent = name;
    item.append(strong, ": ", message);
  } else {
    item.append(sentence(message));
  }
  return item;
}

// -- beginning -----------------------------------------------------------------------------------------------

connectDialogs({
  fields,
  fill(values) {
    fields.fill(values);
    keepDraft();
    changed();
    preview();
  },
});
restoreDraft();
changed();
preview();
