// The film strip of samples: moves from step to step, marks what changed, and takes new answers as they come.
import { getPage, replaceParts } from "./api.js";

const address = location.pathname;
const strip = () => document.querySelector("[data-part='film-strip']");
const scroll = () => document.querySelector("[data-film-scroll]");
let numColumns = Number(new URLSearchParams(location.search).get("columns")) || 0;
let follows = true;
let chosen = null;
let movingTimer = null;

function columns() {
  return [...scroll().querySelectorAll("[data-film-column]")];
}

function baseWidth() {
  const base = columns()[0];
  return getComputedStyle(base).position === "sticky" ? base.offsetWidth : 0;
}

// Brings a column into view; `index` counts from the base model's.
function choose(index, behavior = "smooth") {
  const all = columns();
  const number = Math.min(Math.max(index, 0), all.length - 1);
  follows = number === all.length - 1;
  chosen = all[number].dataset.key;
  show();
  const left = number === 0 ? 0 : all[number].offsetLeft - baseWidth() - 1;
  move({ left, behavior });
}

// A scroll of our own says nothing about what somebody looks at; it is over when nothing more of it comes.
function move(place) {
  waitForItsEnd();
  scroll().scrollTo(place);
}

function waitForItsEnd() {
  clearTimeout(movingTimer);
  movingTimer = setTimeout(byHand, 500);
}

function byHand() {
  clearTimeout(movingTimer);
  movingTimer = null;
}

function chosenIndex() {
  const all = columns();
  const found = all.findIndex((column) => column.dataset.key === chosen);
  return found < 0 ? all.length - 1 : found;
}

function show() {
  const all = columns();
  const index = chosenIndex();
  const slider = strip().querySelector("[data-film-slider]");
  slider.max = all.length - 1;
  slider.value = index;
  const words = all[index].firstChild.textContent.trim();
  slider.setAttribute("aria-valuetext", words);
  strip().querySelector("[data-film-label]").textContent = words;
  all.forEach((column, place) => column.classList.toggle("is-chosen", place === index));
  for (const row of scroll().querySelectorAll("tr[data-key='answers']")) {
    [...row.cells].forEach((cell, place) => cell.classList.toggle("is-chosen", place === index));
  }
}

// Scrolled by hand: the first column that is wholly in view is the chosen one.
function onScroll() {
  if (movingTimer) {
    waitForItsEnd();
    return;
  }
  const element = scroll();
  const left = element.scrollLeft + baseWidth();
  const all = columns();
  follows = element.scrollLeft + element.clientWidth >= element.scrollWidth - 8;
  const index = follows ? all.length - 1 : element.scrollLeft < 8 ? 0 : all.findIndex((column, place) => place > 0 && column.offsetLeft >= left - 8);
  chosen = all[index < 0 ? all.length - 1 : index].dataset.key;
  show();
}

function onKey(event) {
  const move = { ArrowLeft: -1, ArrowRight: 1, Home: -Infinity, End: Infinity }[event.key];
  if (!move || event.ctrlKey || event.metaKey || event.altKey) return;
  event.preventDefault();
  choose(chosenIndex() + move);
}

function markWords() {
  const element = scroll();
  element.classList.toggle("shows-new", strip().querySelector("[data-film-new]").checked);
  element.classList.toggle("shows-gone", strip().querySelector("[data-film-gone]").checked);
}

let newest = 0;

async function refresh() {
  const number = (newest += 1);
  const wasFollowing = follows;
  // A new column must not push out the one that is looked at.
  if (scroll() && !wasFollowing) numColumns = Math.max(numColumns, columns().length);
  let page;
  try {
    page = await getPage(`${address}film_strip/?columns=${numColumns || ""}`);
  } catch {
    // The next answer tries again.
    return;
  }
  if (number !== newest) return;
  const place = placeOfChosen();
  replaceParts(page);
  if (!scroll()) return;
  connect();
  if (wasFollowing) choose(columns().length - 1, "auto");
  else stayAt(place);
}

// How far from the strip's left edge the chosen column is, and moving so that it is there again.
function placeOfChosen() {
  return scroll() ? columns()[chosenIndex()].offsetLeft - scroll().scrollLeft : 0;
}

function stayAt(place) {
  move({ left: columns()[chosenIndex()].offsetLeft - place, behavior: "auto" });
  show();
}

// Older columns come in before those in view, which stay where they are.
async function showOlder(number) {
  numColumns = Number(number);
  follows = false;
  await refresh();
}

// The strip may come only later: a run without prompts can be given some while it trains.
function connect() {
  const element = scroll();
  if (!element || element.dataset.isConnected) return;
  element.dataset.isConnected = "1";
  element.addEventListener("scroll", onScroll, { passive: true });
  for (const kind of ["wheel", "pointerdown", "touchstart"]) element.addEventListener(kind, byHand, { passive: true });
  element.addEventListener("keydown", onKey);
  markWords();
  choose(columns().length - 1, "auto");
}

document.addEventListener("input", ({ target }) => {
  if (target.matches("[data-film-slider]")) choose(Number(target.value), "auto");
});
document.addEventListener("change", ({ target }) => {
  if (target.matches("[data-film-new], [data-film-gone]")) markWords();
});
document.addEventListener("click", (event) => {
  const older = event.target.closest("[data-film-older]");
  if (!older) return;
  event.preventDefault();
  showOlder(older.dataset.filmOlder);
});
document.addEventListener("partchange", ({ target }) => {
  if (target.dataset.part === "strip-version") refresh();
});
connect();
