// A dataset's page: its check as it goes on, the doctor's questions, rows read in another way, new versions.
import { getPage, replaceParts } from "./api.js";
import { Polling } from "./polling.js";
import { connectForms } from "./sent_forms.js";
import { connectUploads } from "./uploads.js";

const polling = new Polling();
connectForms(async (answer, form) => {
  if (form.closest("dialog")) location.reload();
  else await polling.now();
});
connectUploads(document.querySelector("[data-uploads]"), ({ url, isKnown }) => {
  if (url && !isKnown) location.assign(url);
  else polling.now();
});

let newest = 0;

// Of several quick choices the last one is shown.
async function showRows(query, isBack = false) {
  const number = (newest += 1);
  const part = document.querySelector("[data-part='preview']");
  part.setAttribute("aria-busy", "true");
  try {
    const page = await getPage(`${location.pathname}?${query}`);
    if (number !== newest) return;
    if (!isBack) history.pushState(null, "", `?${query}`);
    replaceParts(page);
    showChoice(part.querySelector("[data-rows-form]"));
  } catch {
    if (number === newest) location.assign(`?${query}`);
  }
  part.removeAttribute("aria-busy");
}

// What somebody typed outlives a change of the markup; here the fields say what is shown.
function showChoice(form) {
  for (const field of form?.elements ?? []) {
    if (field.nodeName === "INPUT") field.value = field.defaultValue;
    else if (field.nodeName === "SELECT") field.value = [...field.options].find(({ defaultSelected }) => defaultSelected)?.value ?? field.value;
  }
}

document.addEventListener("submit", (event) => {
  if (!event.target.matches("[data-rows-form]")) return;
  event.preventDefault();
  showRows(new URLSearchParams(new FormData(event.target)).toString());
});
document.addEventListener("change", (event) => {
  const form = event.target.closest("[data-rows-form]");
  if (form?.reportValidity()) form.requestSubmit();
});
document.addEventListener("click", (event) => {
  const link = event.target.closest("[data-rows-link]");
  if (!link || event.ctrlKey || event.metaKey || event.shiftKey) return;
  event.preventDefault();
  showRows(new URL(link.href).search.slice(1));
});
addEventListener("popstate", () => showRows(location.search.slice(1), true));
