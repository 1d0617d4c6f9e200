// Pages that are shown again as they were left, or from the browser's cache, by its Back button: what they show may be old.
export function onComingBack(refresh) {
  addEventListener("pageshow", (event) => {
    if (event.persisted) refresh();
  });
  const [navigation] = performance.getEntriesByType("navigation");
  if (navigation?.type === "back_forward") refresh();
}
