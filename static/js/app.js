// What every page shares: theme, copy buttons, relative times, keyboard help.
import { copyText } from "./copying.js";
import { ago } from "./format.js";

const THEMES = ["system", "light", "dark"];

function keptTheme() {
  return document.documentElement.dataset.theme ?? "system";
}

function setTheme(theme) {
  if (theme === "system") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = theme;
  try {
    localStorage.setItem("theme", theme);
  } catch {
    // Kept for this page only.
  }
  showTheme();
  document.dispatchEvent(new CustomEvent("themechange"));
}

function showTheme() {
  const theme = keptTheme();
  const toggle = document.querySelector("[data-theme-toggle]");
  toggle?.setAttribute("title", `Theme: ${theme}`);
  toggle?.setAttribute("aria-label", `Theme: ${theme}`);
  for (const radio of document.querySelectorAll("[data-theme-choice] input")) radio.checked = radio.value === theme;
}

async function copy(button) {
  const text = button.dataset.copyText ?? document.querySelector(button.dataset.copy)?.textContent ?? "";
  const isCopied = await copyText(text.trim(), button);
  const { copyLabel = button.textContent } = button.dataset;
  button.dataset.copyLabel = copyLabel;
  button.classList.toggle("is-copied", isCopied);
  button.textContent = isCopied ? "Copied" : "Copy failed: select the text and press Ctrl+C";
  setTimeout(() => {
    button.classList.remove("is-copied");
    button.textContent = copyLabel;
  }, isCopied ? 1500 : 5000);
}

function isTyping(target) {
  return target.closest("input, select, textarea, [contenteditable]") !== null;
}

function onKey(event) {
  if (event.ctrlKey || event.metaKey || event.altKey || isTyping(event.target)) return;
  if (event.key === "/") {
    const search = document.querySelector("[data-search]");
    if (!search) return;
    event.preventDefault();
    search.focus();
    search.select();
  } else if (event.key === "n") {
    document.querySelector(".new-run-link")?.click();
  } else if (event.key === "?") {
    document.getElementById("help").togglePopover();
  }
}

function refreshTimes() {
  for (const element of document.querySelectorAll("time[datetime]")) {
    const text = ago(new Date(element.dateTime), Date.now());
    if (element.textContent !== text) element.textContent = text;
  }
}

document.addEventListener("click", (event) => {
  const button = event.target.closest("[data-copy], [data-copy-text]");
  if (button) copy(button);
  if (event.target.closest("[data-theme-toggle]")) {
    setTheme(THEMES[(THEMES.indexOf(keptTheme()) + 1) % THEMES.length]);
  }
});
document.addEventListener("change", (event) => {
  if (event.target.closest("[data-theme-choice]")) setTheme(event.target.value);
  if (event.target.matches("[data-submits]")) event.target.form.requestSubmit();
});
// A form that starts something starts it once, however often its button is pressed.
document.addEventListener("submit", (event) => {
  if (!event.target.matches("[data-once]")) return;
  if (event.target.getAttribute("aria-busy") === "true") event.preventDefault();
  event.target.setAttribute("aria-busy", "true");
  event.submitter?.setAttribute("aria-disabled", "true");
});
addEventListener("pageshow", () => {
  for (const form of document.querySelectorAll("[data-once][aria-busy]")) {
    form.removeAttribute("aria-busy");
    form.querySelector("[aria-disabled]")?.removeAttribute("aria-disabled");
  }
});
document.addEventListener("keydown", onKey);
showTheme();
setInterval(refreshTimes, 15_000);
