// Pieces that every chart has beside its lines.
export function chip(element, number, text) {
  element.hidden = number === 0;
  if (number) element.textContent = text;
}

export function rowOf(kind, texts) {
  const row = document.createElement("tr");
  for (const text of texts) {
    const cell = document.createElement(kind);
    cell.className = "number";
    cell.textContent = text;
    row.append(cell);
  }
  return row;
}
