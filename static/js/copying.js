// Puts text into the clipboard, also where the browser has none for scripts.

// Returns whether it is there. `button` was pressed for it.
export async function copyText(text, button) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    return copyBySelection(text, button);
  }
}

// The clipboard API needs https or localhost; a self-hosted server often has neither. What lies outside of an open
// dialog cannot be selected.
function copyBySelection(text, button) {
  const focused = document.activeElement;
  const area = document.createElement("textarea");
  area.value = text;
  area.className = "visually-hidden";
  (button.closest("dialog") ?? document.body).append(area);
  area.focus({ preventScroll: true });
  area.select();
  const isCopied = document.execCommand("copy");
  area.remove();
  focused?.focus({ preventScroll: true });
  return isCopied;
}
