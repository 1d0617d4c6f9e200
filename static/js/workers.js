// Workers and base models: read again every few seconds while somebody looks, more often while a worker is drained.
import { refreshParts } from "./api.js";
import { connectForms } from "./sent_forms.js";

const INTERVAL_MS = 5000;
const DRAINING_MS = 1000;
let timer = null;

async function refresh() {
  clearTimeout(timer);
  try {
    if (!document.hidden) await refreshParts("/workers/?part");
  } catch {
    // The next turn tries again.
  }
  plan();
}

function plan() {
  clearTimeout(timer);
  timer = setTimeout(refresh, document.querySelector("[data-state='draining']") ? DRAINING_MS : INTERVAL_MS);
}

connectForms(refresh);
plan();
