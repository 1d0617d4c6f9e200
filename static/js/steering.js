// Steering of a run: dialogs open over the page, forms are sent without leaving it, errors stand at their field.
import { postForm } from "./api.js";
import { connectDialogs, finish } from "./dialogs.js";

// `refresh` reads the page's parts again. The section stays the same element while its contents change.
export function connectSteering(section, refresh) {
  if (!section) return;
  connectDialogs(section, clear);
  section.addEventListener("submit", (event) => {
    if (!event.target.matches("[data-steer]")) return;
    event.preventDefault();
    send(section, event.target, refresh);
  });
}

function clear(dialog) {
  for (const form of dialog.querySelectorAll("form")) clearErrors(form);
  dialog.querySelector("[data-dialog-error]")?.setAttribute("hidden", "");
}

async function send(section, form, refresh) {
  const buttons = form.querySelectorAll("button[type='submit']");
  if (form.getAttribute("aria-busy") === "true") return;
  form.setAttribute("aria-busy", "true");
  clearErrors(form);
  for (const button of buttons) button.setAttribute("aria-disabled", "true");
  try {
    const { isDone, answer } = await postForm(form.action, fieldsOf(form));
    if (isDone) {
      finish(form.closest("dialog"));
      say(section, answer.detail, false);
    } else {
      showProblems(section, form, answer);
    }
  } catch (error) {
    showProblems(section, form, { detail: error.message });
  }
  form.removeAttribute("aria-busy");
  for (const button of buttons) button.removeAttribute("aria-disabled");
  await refresh();
}

// Of a form of changes only what was changed is sent, so that what somebody else changed meanwhile stays.
function fieldsOf(form) {
  const fields = new FormData(form);
  if (form.dataset.steer !== "changed") return fields;
  const prompts = [...form.elements].filter(({ name }) => name === "prompt");
  if (!prompts.some(isEdited)) {
    fields.delete("prompt");
    fields.delete("has_prompts");
  }
  for (const field of form.elements) {
    if (field.name && field.type !== "hidden" && field.name !== "prompt" && !isEdited(field)) fields.delete(field.name);
  }
  return fields;
}

function isEdited(field) {
  if (field.nodeName === "SELECT") return ![...field.options].every((option) => option.selected === option.defaultSelected);
  return field.value !== field.defaultValue;
}

function showProblems(section, form, { detail, problems = [] }) {
  const left = problems.filter(({ place, message }) => !showAtField(form, place, message));
  const text = problems.length ? left.map(({ place, message }) => (place && place !== "state" ? `${place}: ${message}` : message)).join("; ") : detail;
  const inDialog = form.closest("dialog[open]")?.querySelector("[data-dialog-error]");
  if (text && inDialog) {
    inDialog.textContent = sentence(text);
    inDialog.hidden = false;
  } else if (text) {
    say(section, text, true);
  }
  form.querySelector("[aria-invalid='true']")?.focus();
}

function showAtField(form, place, message) {
  const field = fieldOf(form, place);
  if (!field) return false;
  const note = document.createElement("span");
  note.className = "field-error";
  note.id = `error-${form.action.split("/").at(-1)}-${place.replace(/\W/g, "-")}`;
  note.textContent = message;
  field.setAttribute("aria-invalid", "true");
  field.setAttribute("aria-describedby", note.id);
  field.after(note);
  return true;
}

// "samples.prompts[2]" is the third prompt that is not empty.
function fieldOf(form, place) {
  const prompt = /^samples\.prompts(?:\[(\d+)\])?/.exec(place);
  if (!prompt) return form.elements.namedItem(place);
  const filled = [...form.querySelectorAll("[name='prompt']")].filter(({ value }) => value.trim());
  return filled[Number(prompt[1] ?? 0)] ?? form.querySelector("[name='prompt']");
}

function clearErrors(form) {
  for (const note of form.querySelectorAll(".field-error")) note.remove();
  for (const field of form.querySelectorAll("[aria-invalid]")) {
    field.removeAttribute("aria-invalid");
    field.removeAttribute("aria-describedby");
  }
}

let answerTimer = null;

function say(section, text, isError) {
  const answer = section.querySelector("[data-steer-answer]");
  answer.textContent = sentence(text);
  answer.className = `notice steering-answer ${isError ? "notice-error" : "notice-success"}`;
  answer.hidden = false;
  clearTimeout(answerTimer);
  if (!isError) answerTimer = setTimeout(() => { answer.hidden = true; }, 8000);
}

function sentence(text) {
  const first = text.charAt(0).toUpperCase() + text.slice(1);
  return /[.!?]$/.test(first) ? first : `${first}.`;
}
