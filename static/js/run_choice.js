// Choosing several runs of the list to delete them together. Rows may be replaced at any time, so boxes are asked anew.
const list = document.querySelector("[data-run-list]");
const bar = list.querySelector("[data-chosen]");
const toggle = document.querySelector("[data-choose]");

function show() {
  const num = list.querySelectorAll(".run-choice:checked").length;
  for (const place of bar.querySelectorAll("[data-num-chosen]")) place.textContent = num === 1 ? "1 run" : `${num} runs`;
  bar.hidden = num === 0;
}

function setChoosing(isChoosing) {
  toggle.setAttribute("aria-pressed", isChoosing);
  list.classList.toggle("is-choosing", isChoosing);
  if (!isChoosing) for (const box of list.querySelectorAll(".run-choice:checked")) box.checked = false;
  show();
}

if (bar) {
  toggle.hidden = false;
  toggle.addEventListener("click", () => setChoosing(toggle.getAttribute("aria-pressed") !== "true"));
  list.addEventListener("change", show);
  setChoosing(false); // A browser may have kept checked boxes over a reload.
}
