// Choosing several runs of the list to compare or delete them. Rows may be replaced at any time, so boxes are asked anew.
const list = document.querySelector("[data-run-list]");
const bar = list.querySelector("[data-chosen]");
const toggle = document.querySelector("[data-choose]");
const compare = list.querySelector("[data-compare]");
// As many does the page that compares them take.
const MAX_COMPARED = 20;

function chosen() {
  return [...list.querySelectorAll(".run-choice:checked")].map(({ value }) => value);
}

function show() {
  const runs = chosen();
  for (const place of bar.querySelectorAll("[data-num-chosen]")) place.textContent = runs.length === 1 ? "1 run" : `${runs.length} runs`;
  bar.hidden = runs.length === 0;
  showCompare(runs);
}

// A link, so that it can be opened in a new tab; one that leads nowhere says why.
function showCompare(runs) {
  const canCompare = runs.length > 1 && runs.length <= MAX_COMPARED;
  compare.toggleAttribute("href", canCompare);
  compare.setAttribute("aria-disabled", !canCompare);
  if (canCompare) {
    compare.href = `${compare.dataset.address}?${new URLSearchParams(runs.map((run) => ["run", run]))}`;
    compare.textContent = `Compare ${runs.length} runs`;
  } else {
    compare.textContent = runs.length > MAX_COMPARED ? `Compare: ${MAX_COMPARED} at most` : "Compare: choose one more";
  }
}

function setChoosing(isChoosing) {
  toggle.setAttribute("aria-pressed", isChoosing);
  list.classList.toggle("is-choosing", isChoosing);
  if (!isChoosing) for (const box of list.querySelectorAll(".run-choice:checked")) box.checked = false;
  show();
}

// The run that `j` and `k` have come to.
function chooseSelected() {
  const box = list.querySelector(".run-row.is-selected .run-choice");
  if (!box) return;
  if (toggle.getAttribute("aria-pressed") !== "true") setChoosing(true);
  box.checked = !box.checked;
  show();
}

function onKey(event) {
  if (event.ctrlKey || event.metaKey || event.altKey || event.target.closest("input:not([type='checkbox']), select, textarea")) return;
  if (event.key === "x") chooseSelected();
  else if (event.key === "c" && compare.hasAttribute("href")) compare.click();
}

if (bar) {
  toggle.hidden = false;
  toggle.addEventListener("click", () => setChoosing(toggle.getAttribute("aria-pressed") !== "true"));
  list.addEventListener("change", show);
  document.addEventListener("keydown", onKey);
  setChoosing(false); // A browser may have kept checked boxes over a reload.
}
