// The events of a run in a thin lane under its loss chart: a mark each, neighbours as one with their number.
import { count } from "./format.js";

const MIN_DISTANCE = 26;
const SIGNS = {
  started: "\u25b7", resumed: "\u25b6\ufe0e", paused: "\u2016", changed: "\u0394", extended: "\u2192", forked: "Y",
  retried: "\u21ba", recovered: "\u21bb", saved: "\u25c6", best: "\u2605", evaluated: "\u25cb", "early stopped": "\u25a0",
  "step skipped": "\u2298", "not finite": "\u2298", restored: "\u25b8", stopping: "\u25a0", stopped: "\u25a0", discarded: "\u25a0", finished: "\u25cf", failed: "\u2715", diverged: "!",
};
// Of several events at one place the first of these gives the mark its colour and sign.
const TONES = ["bad", "warn", "busy", "good", "done", "idle"];
const MAX_LINES = 8;

export class EventsLane {
  // `onPoint` hears which event is looked at, or null.
  constructor(element, { onPoint }) {
    this.element = element;
    this.onPoint = onPoint;
    this.events = [];
    this.buttons = new Map();
    this.pinned = null;
    this.track = document.createElement("div");
    this.track.className = "lane-track";
    this.track.setAttribute("role", "toolbar");
    this.track.setAttribute("aria-label", "Events on the chart");
    this.detail = document.createElement("div");
    this.detail.className = "lane-detail small";
    this.detail.hidden = true;
    element.append(this.track, this.detail);
    this.track.addEventListener("pointerover", (event) => this.#look(event.target));
    this.track.addEventListener("pointerleave", () => this.#look(null));
    this.track.addEventListener("focusin", (event) => this.#look(event.target));
    this.track.addEventListener("focusout", () => this.#look(null));
    this.track.addEventListener("click", (event) => this.#pin(event.target));
    this.track.addEventListener("keydown", (event) => this.#onKey(event));
  }

  setEvents(events) {
    this.events = events;
    this.element.hidden = events.length === 0;
  }

  // Puts the marks where their events are, given the plot in use and a function from an event to its x.
  place(u, xOf) {
    if (this.element.hidden) return;
    const left = u.bbox.left / devicePixelRatio;
    const width = u.bbox.width / devicePixelRatio;
    this.track.style.marginLeft = `${left}px`;
    this.track.style.width = `${width}px`;
    const groups = grouped(this.events, (event) => u.valToPos(xOf(event), "x"), width);
    const unused = new Map(this.buttons);
    for (const group of groups) {
      const key = group.events[0].key;
      unused.delete(key);
      this.#show(this.buttons.get(key) ?? this.#made(key), group);
    }
    for (const [key, button] of unused) {
      button.remove();
      this.buttons.delete(key);
    }
    this.#order(groups);
    this.#keepOneTabStop();
    if (this.shown && !this.shown.isConnected) this.#look(null);
  }

  #made(key) {
    const button = document.createElement("button");
    button.type = "button";
    button.className = "lane-mark";
    button.tabIndex = -1;
    this.buttons.set(key, button);
    return button;
  }

  #show(button, { events, left }) {
    const chief = chiefOf(events);
    button.events = events;
    button.style.left = `${left}px`;
    button.dataset.tone = chief.tone;
    button.dataset.kind = chief.kind;
    const sign = SIGNS[chief.kind] ?? "\u2022";
    const text = events.length > 1 ? `${sign}${events.length}` : sign;
    if (button.textContent !== text) button.textContent = text;
    button.setAttribute("aria-label", events.length > 1 ? `${events.length} events: ${events.map(wordsOf).join("; ")}` : wordsOf(chief));
  }

  // In the order of the steps, without moving a button that is in its place and may have the focus.
  #order(groups) {
    let place = this.track.firstElementChild;
    for (const { events: [{ key }] } of groups) {
      const button = this.buttons.get(key);
      if (button === place) place = place.nextElementSibling;
      else this.track.insertBefore(button, place);
    }
  }

  #keepOneTabStop() {
    const all = [...this.track.children];
    if (!all.some((button) => button.tabIndex === 0)) all.at(-1)?.setAttribute("tabindex", "0");
  }

  #onKey(event) {
    const move = { ArrowLeft: -1, ArrowRight: 1, Home: -Infinity, End: Infinity }[event.key];
    if (event.key === "Escape") this.#unpin();
    if (!move) return;
    event.preventDefault();
    const all = [...this.track.children];
    const at = all.indexOf(document.activeElement);
    const next = all[Math.min(Math.max(at + move, 0), all.length - 1)];
    for (const button of all) button.tabIndex = button === next ? 0 : -1;
    next?.focus();
  }

  #pin(target) {
    const button = target.closest(".lane-mark");
    this.pinned = button === this.pinned ? null : button;
    this.#look(button);
  }

  #unpin() {
    this.pinned = null;
    this.#look(null);
  }

  #look(target) {
    if (this.pinned && !this.pinned.isConnected) this.pinned = null;
    const focused = this.track.contains(document.activeElement) ? document.activeElement : null;
    const button = target?.closest?.(".lane-mark") ?? this.pinned ?? focused;
    if (button === this.shown) return;
    this.shown = button;
    for (const other of this.track.children) other.classList.toggle("is-shown", other === button);
    this.detail.hidden = !button;
    this.detail.replaceChildren(...(button ? linesOf(button.events) : []));
    this.onPoint(button ? chiefOf(button.events) : null);
  }
}

function grouped(events, leftOf, width) {
  const groups = [];
  const placed = events.map((event) => ({ event, left: leftOf(event) })).sort((a, b) => a.left - b.left);
  for (const { event, left } of placed) {
    if (!(left >= -1 && left <= width + 1)) continue;
    const group = groups.at(-1);
    if (group && left - group.left < MIN_DISTANCE) group.events.push(event);
    else groups.push({ left, events: [event] });
  }
  return groups;
}

function chiefOf(events) {
  const rank = ({ kind, tone, isQuiet }) => TONES.indexOf(tone) + (isQuiet ? 10 : 0) - (kind === "best" ? 1 : 0);
  return events.reduce((best, event) => (rank(event) < rank(best) ? event : best));
}

function wordsOf({ title, step, detail }) {
  return `${title} at step ${count(step)}${detail ? `: ${detail}` : ""}`;
}

function linesOf(events) {
  const lines = events.slice(0, MAX_LINES).map((event) => {
    const line = document.createElement("p");
    const kind = document.createElement("strong");
    kind.textContent = event.title;
    line.append(kind, ` at step ${count(event.step)}${event.detail ? ` \u00b7 ${event.detail}` : ""}`);
    return line;
  });
  if (events.length > MAX_LINES) {
    const more = document.createElement("p");
    more.textContent = `and ${events.length - MAX_LINES} more, in the list of events`;
    lines.push(more);
  }
  return lines;
}
