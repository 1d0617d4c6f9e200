// Tables of checkpoints: all are chosen at once, and the deletion says how many there are and what they take.
import { refreshParts } from "./api.js";
import { onComingBack } from "./coming_back.js";
import { filesize } from "./format.js";

const boxesOf = (table) => [...table.querySelectorAll("input[name='path']")];

function show() {
  for (const table of document.querySelectorAll(".checkpoints-table")) {
    const boxes = boxesOf(table);
    const chosen = boxes.filter(({ checked }) => checked);
    const all = table.querySelector("[data-choose-all]");
    all.hidden = false;
    all.checked = chosen.length === boxes.length && boxes.length > 0;
    all.indeterminate = chosen.length > 0 && chosen.length < boxes.length;
    const below = table.parentElement.nextElementSibling;
    const size = filesize(chosen.reduce((sum, { dataset }) => sum + Number(dataset.size), 0));
    below.querySelector("[data-num-chosen]").textContent = `Delete ${chosen.length} chosen`;
    below.querySelector("[data-what-chosen]").textContent =
      chosen.length === 1 ? `1 checkpoint (${size})` : `${chosen.length} checkpoints (${size})`;
  }
}

document.addEventListener("change", ({ target }) => {
  if (target.matches("[data-choose-all]")) {
    for (const box of boxesOf(target.closest("table"))) box.checked = target.checked;
  }
  if (target.matches("[data-choose-all], input[name='path']")) show();
});
document.addEventListener("partchange", show);
show();
// A run's page brings itself up to date.
if (document.querySelector("[data-part='checkpoint-list']")) {
  onComingBack(() => refreshParts(location.pathname + location.search).catch(() => {})); // away: it stays as it is
}
