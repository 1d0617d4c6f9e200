// Requests to this server. A lost sign-in leads to the login page.
async function get(url, accept) {
  const response = await fetch(url, { headers: { accept }, credentials: "same-origin" });
  if (response.redirected && new URL(response.url).pathname.startsWith("/login/")) {
    location.assign(`/login/?next=${encodeURIComponent(location.pathname)}`);
    throw new Error("signed out");
  }
  if (!response.ok) throw new Error(`the server answered ${response.status}`);
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

// Replaces every [data-part] that differs, unless somebody is using it.
export function replaceParts(page) {
  for (const fresh of page.querySelectorAll("[data-part]")) {
    const current = document.querySelector(`[data-part="${fresh.dataset.part}"]`);
    if (!current || current.isEqualNode(fresh) || isInUse(current)) continue;
    current.replaceWith(document.adoptNode(fresh));
  }
}

function isInUse(part) {
  const selection = getSelection();
  if (selection && !selection.isCollapsed && part.contains(selection.anchorNode)) return true;
  return part.contains(document.activeElement) || part.querySelector(":popover-open") !== null;
}
