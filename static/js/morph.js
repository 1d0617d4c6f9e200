// Makes a part of the page like its fresh copy, changing only what differs: focus, selection, scrolling,
// typed values, checked boxes and folded details outlive a refresh. An open dialog stays as it is.
const ROWS = new Set(["TR", "LI", "ARTICLE"]);
// State of the person at the page, not of the server.
const KEPT_ATTRIBUTES = new Set(["open", "data-kept", "aria-busy"]);

export function morph(current, fresh) {
  const focused = document.activeElement;
  const hadFocus = current.contains(focused);
  const checked = checkedBoxes(current);
  morphElement(current, fresh);
  for (const box of checked) restoreBox(current, box);
  if (!hadFocus || document.activeElement === focused) return;
  if (focused.isConnected) focused.focus({ preventScroll: true });
  else focusNear(current);
}

function morphElement(current, fresh) {
  // data-kept: a script owns the element's attributes; data-kept="all": its contents too.
  const kept = current.dataset?.kept;
  if (isBusy(current) || kept === "all") return;
  if (kept === undefined) copyAttributes(current, fresh);
  morphChildren(current, fresh);
}

function morphChildren(current, fresh) {
  const keyed = keyedChildren(current);
  const wanted = new Set([...fresh.children].map(keyOf));
  let place = current.firstChild;
  for (const node of [...fresh.childNodes]) {
    const key = keyOf(node);
    place = withoutGone(place, wanted);
    const known = key ? keyed.get(key) : matching(place, node);
    if (!known) {
      current.insertBefore(document.adoptNode(node), place);
      continue;
    }
    keyed.delete(key);
    if (known === place) place = place.nextSibling;
    else if (key) current.insertBefore(known, place);
    else place = dropUpTo(place, known);
    morphNode(known, node);
  }
  while (place) {
    const next = place.nextSibling;
    if (!isBusy(place)) place.remove();
    place = next;
  }
}

// Removing what is gone first leaves the others where they are: a moved element would lose the focus.
function withoutGone(place, wanted) {
  while (place && keyOf(place) && !wanted.has(keyOf(place))) {
    const next = place.nextSibling;
    if (!isBusy(place)) place.remove();
    place = next;
  }
  return place;
}

function morphNode(current, fresh) {
  if (current.nodeType === Node.ELEMENT_NODE) morphElement(current, fresh);
  else if (current.data !== fresh.data) current.data = fresh.data;
}

function dropUpTo(place, known) {
  while (place !== known) {
    const next = place.nextSibling;
    if (!isBusy(place)) place.remove();
    place = next;
  }
  return known.nextSibling;
}

function copyAttributes(current, fresh) {
  for (const { name } of [...current.attributes]) {
    if (!fresh.hasAttribute(name) && !KEPT_ATTRIBUTES.has(name)) current.removeAttribute(name);
  }
  for (const { name, value } of fresh.attributes) {
    if (KEPT_ATTRIBUTES.has(name) || current.getAttribute(name) === value) continue;
    if (name !== "value" || !isToken(current)) current.setAttribute(name, value);
  }
}

// A token is masked anew each time, and the old mask goes on being valid.
function isToken(element) {
  return element.name === "csrfmiddlewaretoken";
}

// A row without a key is only the same row if it is equal: the next one must not inherit its checked box.
function matching(place, node) {
  if (!place) return null;
  if (!ROWS.has(node.nodeName)) return isAlike(place, node) ? place : null;
  for (let other = place; other; other = other.nextSibling) if (other.isEqualNode(node)) return other;
  return null;
}

function isAlike(place, node) {
  return place.nodeType === node.nodeType && place.nodeName === node.nodeName && !keyOf(place);
}

function keyedChildren(element) {
  const keyed = new Map();
  for (const child of element.children) {
    const key = keyOf(child);
    if (key && !keyed.has(key)) keyed.set(key, child);
  }
  return keyed;
}

// A row is known by its own key, or by what it acts on.
function keyOf(node) {
  if (node.nodeType !== Node.ELEMENT_NODE) return "";
  if (node.id) return `#${node.id}`;
  if (node.dataset.key) return `${node.nodeName} ${node.dataset.key}`;
  if (node.nodeName === "LABEL" || !ROWS.has(node.nodeName)) return "";
  const acts = node.querySelector("input[type='checkbox'], form[action], a[href]");
  const target = acts?.getAttribute("value") ?? acts?.getAttribute("action") ?? acts?.getAttribute("href");
  return target ? `${node.nodeName} ${target}` : "";
}

function isBusy(node) {
  return node.nodeType === Node.ELEMENT_NODE && node.matches("dialog[open], :popover-open");
}

function checkedBoxes(element) {
  const boxes = element.querySelectorAll("input[type='checkbox'], input[type='radio']");
  return [...boxes].filter((box) => box.checked !== box.defaultChecked);
}

function restoreBox(part, { name, value, checked, isConnected }) {
  if (isConnected) return;
  const same = [...part.querySelectorAll("input")].find((box) => box.name === name && box.value === value);
  if (same) same.checked = checked;
}

// What had the focus is gone: the part itself takes it, so that the next Tab goes on from there.
function focusNear(part) {
  if (!part.hasAttribute("tabindex")) part.setAttribute("tabindex", "-1");
  part.focus({ preventScroll: true });
}
