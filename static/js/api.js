// Requests to this server. A lost sign-in leads to the login page.
import { morph } from "./morph.js";

async function get(url, accept) {
  // A page that was gone back to would else be given what the browser's cache holds.
  const response = await fetch(url, { headers: { accept }, credentials: "same-origin", cache: "no-store" });
  if (response.redirected && new URL(response.url).pathname.startsWith("/login/")) {
    location.assign(`/login/?next=${encodeURIComponent(location.pathname + location.search)}`);
    throw new Error("signed out");
  }
  if (!response.ok) throw Object.assign(new Error(`the server answered ${response.status}`), { status: response.status });
  return response;
}

export async function getJson(url) {
  return (await get(url, "application/json")).json();
}

export async function getPage(url) {
  return parsePage(await (await get(url, "text/html")).text());
}

// Markup comes from this server's own templates, which escape all data; scripts in it never run.
export function parsePage(html) {
  return new DOMParser().parseFromString(html, "text/html");
}

// Sends a form; returns the answer, and whether it was accepted.
export async function postForm(url, form) {
  const response = await fetch(url, {
    method: "POST",
    body: new URLSearchParams(form),
    headers: { accept: "application/json" },
    credentials: "same-origin",
  });
  if (!(response.headers.get("content-type") ?? "").startsWith("application/json")) {
    throw new Error(response.redirected ? "you are signed out; reload the page" : `the server answered ${response.status}`);
  }
  return { isDone: response.ok, answer: await response.json() };
}

// Reads the parts at an address and shows them.
export async function refreshParts(url) {
  const asked = performance.now();
  replaceParts(await getPage(url), asked);
}

// When what each part shows was asked for.
const shown = new Map();

// Brings every [data-part] up to date without disturbing whoever uses it, unless it shows what was asked for later:
// answers overtake one another on a busy server.
export function replaceParts(page, asked = performance.now()) {
  for (const fresh of page.querySelectorAll("[data-part]")) {
    if (asked < (shown.get(fresh.dataset.part) ?? 0)) continue;
    shown.set(fresh.dataset.part, asked);
    const current = document.querySelector(`[data-part="${fresh.dataset.part}"]`);
    if (!current || current.isEqualNode(fresh)) continue;
    morph(current, fresh);
    current.dispatchEvent(new CustomEvent("partchange", { bubbles: true }));
  }
}
