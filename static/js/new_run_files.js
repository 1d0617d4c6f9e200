// Dialogs of a new run: settings from a YAML file, and the form as YAML, Python and curl.
import { postForm } from "./api.js";
import { sentence } from "./new_run_fields.js";

export function connectDialogs({ fill, fields }) {
  document.addEventListener("click", (event) => {
    const button = event.target.closest("[popovertarget]");
    if (!button || !button.getAttribute("popovertarget").endsWith("-dialog")) return;
    event.preventDefault();
    const dialog = document.getElementById(button.getAttribute("popovertarget"));
    if (button.matches("[data-close]")) dialog.close();
    else if (button.matches("[data-export]")) openExport(dialog, fields);
    else openImport(dialog);
  });
  connectImport(fill);
  connectTabs();
}

function listProblems(box, list, sentences) {
  list.replaceChildren(...sentences.map((text) => {
    const item = document.createElement("li");
    item.textContent = sentence(text);
    return item;
  }));
  box.hidden = sentences.length === 0;
}

// -- import ------------------------------------------------------------------------------------------------

const importProblems = (sentences) =>
  listProblems(document.querySelector("[data-import-problems]"), document.querySelector("[data-import-list]"), sentences);

function openImport(dialog) {
  importProblems([]);
  dialog.showModal();
}

function connectImport(fill) {
  const form = document.querySelector("[data-import]");
  form.elements.file.addEventListener("change", async () => {
    const [file] = form.elements.file.files;
    if (file) form.elements.text.value = await file.text();
    form.elements.file.value = "";
  });
  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    const sent = new FormData(form);
    sent.delete("file");
    try {
      const { isDone, answer } = await postForm(form.action, sent);
      if (isDone) {
        form.closest("dialog").close();
        fill(answer.values);
      } else {
        importProblems(answer.sentences ?? [answer.detail.replace(/^text: /, "")]);
      }
    } catch (error) {
      importProblems([error.message]);
    }
  });
}

// -- export ------------------------------------------------------------------------------------------------

let texts = {};

async function openExport(dialog, fields) {
  const { form } = fields;
  let problems = [];
  texts = {};
  try {
    const { isDone, answer } = await postForm(form.getAttribute("data-export-url") + location.search, new FormData(form));
    if (isDone) texts = answer;
    else problems = answer.problems?.map(({ place, message }) => (place ? `${place}: ${message}` : message)) ?? [answer.detail];
  } catch (error) {
    problems = [error.message];
  }
  listProblems(document.querySelector("[data-export-problems]"), document.querySelector("[data-export-list]"), problems);
  for (const part of dialog.querySelectorAll("[data-export-tabs], [data-export-panel], [data-download]")) part.hidden = problems.length > 0;
  show("yaml");
  dialog.showModal();
}

function show(kind) {
  for (const tab of document.querySelectorAll("[data-tab]")) {
    const isShown = tab.dataset.tab === kind;
    tab.setAttribute("aria-selected", String(isShown));
    tab.tabIndex = isShown ? 0 : -1;
  }
  document.querySelector("[data-export-panel]").setAttribute("aria-labelledby", `tab-${kind}`);
  document.getElementById("export-text").textContent = texts[kind] ?? "";
  document.querySelector("[data-export-note]").hidden = kind === "yaml" || !texts[kind];
}

function connectTabs() {
  const tabs = [...document.querySelectorAll("[data-tab]")];
  for (const tab of tabs) tab.addEventListener("click", () => show(tab.dataset.tab));
  document.querySelector("[data-export-tabs]").addEventListener("keydown", (event) => {
    const move = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!move) return;
    const next = tabs[(tabs.findIndex((tab) => tab === document.activeElement) + move + tabs.length) % tabs.length];
    show(next.dataset.tab);
    next.focus();
  });
}
