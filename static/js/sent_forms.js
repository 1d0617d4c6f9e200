// Dialogs over the page, and forms that are sent without leaving it; an error stands in its form.
import { postForm } from "./api.js";

// `onDone` gets the server's answer when a form was accepted.
export function connectForms(onDone) {
  document.addEventListener("click", onClick);
  document.addEventListener("submit", (event) => {
    if (!event.target.matches("[data-send]")) return;
    event.preventDefault();
    send(event.target, onDone);
  });
}

// Without JavaScript the dialogs are popovers; with it they are modal and keep the focus inside.
function onClick(event) {
  if (event.target.nodeName === "DIALOG" && event.detail > 0) closeFromBackdrop(event.target, event);
  const button = event.target.closest("[popovertarget]");
  const dialog = button && document.getElementById(button.getAttribute("popovertarget"));
  if (dialog?.nodeName !== "DIALOG") return;
  event.preventDefault();
  if (button.matches("[data-dialog-close]")) dialog.close();
  else dialog.showModal();
}

function closeFromBackdrop(dialog, { clientX, clientY }) {
  const { left, right, top, bottom } = dialog.getBoundingClientRect();
  if (clientX < left || clientX > right || clientY < top || clientY > bottom) dialog.close();
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
    form.closest("dialog")?.close();
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
