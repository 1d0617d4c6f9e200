// The weights that a column of a talk may ask.
import { onComingBack } from "./coming_back.js";

const UNLISTED = "No longer listed: ";
const LOOK_MS = 30_000;

// A lost sign-in leads nowhere: what was said stays on the page.
export async function readWeights(url) {
  const response = await fetch(url, { headers: { accept: "application/json" }, credentials: "same-origin" });
  if (response.redirected || !response.ok) throw new Error(`the server answered ${response.status}`);
  return (await response.json()).groups;
}

// Calls back when they may be others: a run's page tells of its checkpoints, on a page without them one has to look.
export function followWeights(refresh) {
  document.addEventListener("partchange", (event) => {
    if (event.target.dataset.part === "checkpoints") refresh();
  });
  if (document.querySelector("[data-part='checkpoints']")) return;
  const look = () => {
    if (!document.hidden) refresh();
  };
  setInterval(look, LOOK_MS);
  document.addEventListener("visibilitychange", look);
  onComingBack(look);
}

// What was chosen stays chosen when it leaves the list: a conversation never goes on with other weights unasked.
export function offerWeights(select, groups, value) {
  const chosen = select.selectedOptions[0];
  const made = groups.map(({ label, choices }) => {
    const group = document.createElement("optgroup");
    group.label = label;
    group.append(...choices.map((choice) => new Option(choice.label, choice.value)));
    return group;
  });
  select.replaceChildren(...made);
  if (chosen && ![...select.options].some((option) => option.value === value)) {
    const label = chosen.text.startsWith(UNLISTED) ? chosen.text : UNLISTED + chosen.text;
    select.prepend(new Option(label, value));
  }
  if ([...select.options].some((option) => option.value === value)) select.value = value;
}
