// Workers and base models: read again every few seconds while somebody looks.
import { getPage, replaceParts } from "./api.js";

const INTERVAL_MS = 5000;

async function refresh() {
  if (document.hidden) return;
  try {
    replaceParts(await getPage("/workers/?part"));
  } catch {
    // The next turn tries again.
  }
}

setInterval(refresh, INTERVAL_MS);
