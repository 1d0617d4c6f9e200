// The weights that a column of a talk may ask.
const UNLISTED = "No longer listed: ";

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
