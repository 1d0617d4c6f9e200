// The form of a new run: previewed while it is typed, kept as a draft, sent with all problems shown at once.
import { getPage, parsePage, postForm } from "./api.js";
import { onComingBack } from "./coming_back.js";
import { Draft } from "./new_run_draft.js";
import { Fields, sentence } from "./new_run_fields.js";
import { connectDialogs } from "./new_run_files.js";
import { ProblemBox } from "./new_run_problems.js";

const DEBOUNCE_MS = 300;
const REPEAT_MS = 15_000;
// While a dataset is being checked, which may be chosen once that is done.
const GROWING_REPEAT_MS = 1500;

const form = document.querySelector("[data-new-run]");
// Fields named "dataset" and "length" hide the properties of that name.
const lengthChoice = form.elements.namedItem("length");
const fields = new Fields(form);
const folded = document.querySelector("[data-more]");
const card = document.querySelector("[data-preview]");
const summary = document.querySelector("[data-summary]");
const startButton = document.querySelector("[data-start]");
const initial = fields.read();
const [openedWith = ""] = JSON.parse(fields.wrapper("dataset").dataset.base);
const draft = new Draft(form.getAttribute("data-draft-key"), openedWith);
const box = new ProblemBox(fields);
const touched = new Set();
let wasSent = box.isShown;
// Until something is changed the box says what the server said, which may be more than the preview knows.
let isChanged = false;
let timer = null;
let newest = 0;
let isStarting = false;

// -- what the form comes to ----------------------------------------------------------------------------------

function markChanged() {
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
  let answer = null;
  let problem = "";
  try {
    const reply = await postForm(form.getAttribute("data-preview-url") + location.search, new FormData(form));
    if (reply.isDone) answer = reply.answer;
    else problem = reply.answer.detail;
  } catch (error) {
    problem = error instanceof TypeError ? "the server cannot be reached" : error.message;
  }
  if (mine === newest) {
    showFailure(problem);
    if (answer) apply(answer);
    if (answer && answer.offer !== fields.offered) offerDatasets();
  }
  // What was typed meanwhile has planned a preview of its own, which is sooner.
  const delay = answer?.is_growing ? GROWING_REPEAT_MS : REPEAT_MS;
  timer ??= setTimeout(() => (document.hidden ? schedule(REPEAT_MS) : preview()), delay);
}

// What has become ready since the page was opened can be chosen; without an answer the next preview asks again.
async function offerDatasets() {
  const page = await getPage(location.pathname + location.search).catch(() => null);
  if (page) fields.offerDatasets(page);
}

function showFailure(problem) {
  const note = card.querySelector("[data-preview-problem]");
  note.hidden = !problem;
  note.textContent = problem ? sentence(`not up to date: ${problem}`) : "";
  if (!problem) return;
  card.classList.add("is-stale");
  summary.textContent = note.textContent;
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
  if (box.isShown && isChanged) box.show(problems);
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

function restoreDraft() {
  const values = draft.read();
  if (!values || wasSent || JSON.stringify(values) === JSON.stringify(initial)) return;
  fields.fill(values);
  document.querySelector("[data-draft-note]").hidden = false;
}

document.querySelector("[data-discard]").addEventListener("click", () => {
  draft.drop();
  fields.fill({ ...Object.fromEntries([...fields.growing.keys()].map((place) => [place, []])), ...initial });
  touched.clear();
  wasSent = false;
  box.show([]);
  document.querySelector("[data-draft-note]").hidden = true;
  markChanged();
  preview();
  form.elements.namedItem("dataset").focus();
});

// -- typing and sending --------------------------------------------------------------------------------------

function changed(delay = DEBOUNCE_MS) {
  isChanged = true;
  draft.keep(fields.read());
  markChanged();
  schedule(delay);
}

form.addEventListener("input", (event) => {
  const { name } = event.target;
  if (name === "num_epochs" || name === "num_steps") lengthChoice.value = name.slice(4);
  touched.add(name);
  changed();
});

form.addEventListener("click", (event) => {
  const reset = event.target.closest("[data-reset]");
  if (!reset) return;
  const wrapper = reset.closest("[data-field]");
  fields.reset(wrapper);
  fields.inputOf(wrapper.dataset.field)?.focus();
  changed(0);
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

// Back from the run that was started: the page is as it was left, and starts the next one. Back from an upload, in this
// tab or another: it can be chosen.
onComingBack(() => {
  mayStart();
  preview();
});
document.addEventListener("visibilitychange", () => {
  if (!document.hidden) preview();
});

function mayStart() {
  isStarting = false;
  startButton.removeAttribute("aria-disabled");
}

async function start() {
  if (isStarting) return;
  isStarting = true;
  wasSent = true;
  isChanged = false;
  startButton.setAttribute("aria-disabled", "true");
  try {
    const { isDone, answer } = await postForm(form.action, new FormData(form));
    if (isDone) {
      draft.drop();
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
  box.show(problems);
  card.classList.add("is-stale");
  summary.textContent = shortProblem(problems);
  if (!fields.focusFirstProblem()) box.focus();
}

// -- beginning -----------------------------------------------------------------------------------------------

connectDialogs({
  fields,
  fill(values) {
    fields.fill(values);
    changed(0);
  },
});
restoreDraft();
markChanged();
preview();
