// The weight of the smoothing that somebody has chosen, kept in their browser.
export function keptWeight(otherwise) {
  try {
    const weight = Number(localStorage.getItem("smoothing") ?? otherwise);
    return weight >= 0 && weight < 1 ? weight : otherwise;
  } catch {
    return otherwise;
  }
}

export function keepWeight(weight) {
  try {
    localStorage.setItem("smoothing", String(weight));
  } catch {
    // Kept for this page only.
  }
}
