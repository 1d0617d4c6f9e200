// Dialogs over the page, and forms that are sent without leaving it; an error stands in its form.
import { postForm } from "./api.js";
import { connectDialogs, finish } from "./dialogs.js";

// `onDone` gets the server's answer when a form was accepted.
export function connectForms(onDone) {
  connectDialogs(document);
  document.addEventListener("submit", (event) => {
    if (!event.target.matches("[data-send]")) return;
    event.preventDefault();
    send(event.target, onDone);
  });
}

async function send(form, onDone) {
  if (form.getAttribute("aria-busy") === "true") return;
  form.setAttribute("aria-busy", "true");
  showError(form, "");
  let answer = null;
  try {
    const reply = await postForm(form.action, new FormData(form));
    answer = reply.answer;
    if (!reply.isDone) throw new Error(answer.detail);
    finish(form.closest("dialog"));
  } catch (error) {
    showError(form, error.message);
    answer = null;
  }
  form.removeAttribute("aria-busy");
  if (answer?.url) location.assign(answer.url);
  else if (answer) await onDone(answer, form);
}

function showError(form, text) {
  const place = form.querySelector("[data-form-error]") ?? form.closest(".state-notice")?.querySelector("[data-form-error]");
  if (!place) return;
  place.textContent = text ? `${text.charAt(0).toUpperCase()}${text.slice(1)}.` : "";
  place.hidden = !text;
}
