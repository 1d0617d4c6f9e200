// The runs list: rows brought up to date as they change, runs that come into it and the last ones let go, what holds
// for the whole server, keys to move.
import { parsePage, replaceParts } from "./api.js";
import { morph } from "./morph.js";
import { LiveSocket, showState } from "./socket.js";

const list = document.querySelector("[data-run-list]");
const body = list.querySelector("[data-rows]");
const isFirstPage = list.dataset.isLive === "1";
// As many does the server watch for a page.
const MAX_ROWS = 200;
let selected = null;

function rows() {
  return [...body.querySelectorAll("[data-run]")];
}

function rowOf(html) {
  return parsePage(`<table><tbody>${html}</tbody></table>`).querySelector("tr");
}

function rowOfRun(run) {
  return body.querySelector(`[data-run="${CSS.escape(run)}"]`);
}

function apply({ rows: changed, server }) {
  if (server) replaceParts(parsePage(server));
  for (const { run, html, is_new: isNew, is_gone: isGone, before } of changed) {
    const current = rowOfRun(run);
    if (isGone) {
      current?.remove();
      continue;
    }
    const fresh = rowOf(html);
    if (current) {
      fresh.classList.toggle("is-selected", selected === run);
      morph(current, fresh);
    } else if (isNew) {
      leaveFirstSteps();
      body.insertBefore(document.adoptNode(fresh), before && rowOfRun(before));
    }
  }
  letGo();
  // Who counts the chosen rows has to hear of those that went.
  if (changed.length) list.dispatchEvent(new Event("change"));
}

// What runs that came push off the end, but not what somebody has chosen.
function letGo() {
  for (const row of rows().slice(MAX_ROWS)) {
    if (row.querySelector(".run-choice").checked) continue;
    row.remove();
    list.querySelector("[data-let-go]")?.removeAttribute("hidden");
  }
}

// The first run of all: the instructions make way for the table, unless "Try it" is on its way to that run's page.
function leaveFirstSteps() {
  if (document.querySelector("[data-first-steps]:not(:has([aria-busy]))")) location.reload();
}

function select(index) {
  const all = rows();
  if (!all.length) return;
  const row = all[Math.min(Math.max(index, 0), all.length - 1)];
  for (const other of all) other.classList.toggle("is-selected", other === row);
  selected = row.dataset.run;
  row.scrollIntoView({ block: "nearest" });
}

function selectedIndex() {
  return rows().findIndex((row) => row.dataset.run === selected);
}

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.target.closest("input, select, textarea, button, a")) return;
  if (event.key === "j") select(selectedIndex() + 1);
  else if (event.key === "k") select(Math.max(selectedIndex() - 1, 0));
  else if (event.key === "Enter" && selectedIndex() >= 0) rows()[selectedIndex()].querySelector("a").click();
});

body.addEventListener("click", (event) => {
  const row = event.target.closest("[data-run]");
  if (!row || event.target.closest("a, input") || !getSelection().isCollapsed) return;
  row.querySelector("a").click();
});

new LiveSocket("/ws/runs/", {
  hello: () => ({ rows: rows().slice(0, MAX_ROWS).map((row) => row.dataset.run), is_first_page: isFirstPage }),
  onMessage: apply,
  onState: showState,
});
