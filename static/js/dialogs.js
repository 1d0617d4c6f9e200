// Dialogs over the page: their buttons open and close them, and so does a click beside them.
// What was typed into one that was left without an answer is there when it opens again.

// Those that were opened and neither cancelled nor answered.
const begun = new WeakSet();
// The dialog beside which a press began: the click that ends a selection dragged out of a field is no click beside it.
let pressedBeside = null;

// `onOpen` makes a dialog ready. Without JavaScript they are popovers; with it they are modal and keep the focus inside.
export function connectDialogs(root, onOpen = () => {}) {
  root.addEventListener("pointerdown", (event) => {
    pressedBeside = isBeside(event) ? event.target : null;
  });
  root.addEventListener("click", (event) => {
    if (isBeside(event) && pressedBeside === event.target) event.target.close();
    const button = event.target.closest("[popovertarget]");
    const dialog = button && document.getElementById(button.getAttribute("popovertarget"));
    if (dialog?.nodeName !== "DIALOG") return;
    event.preventDefault();
    if (button.matches("[data-dialog-close]")) finish(dialog);
    else open(dialog, onOpen);
  });
}

// Closes the dialog, if any, that was cancelled or answered: it begins afresh when it opens again.
export function finish(dialog) {
  begun.delete(dialog);
  dialog?.close();
}

function open(dialog, onOpen) {
  if (!begun.has(dialog)) for (const form of dialog.querySelectorAll("form")) form.reset();
  begun.add(dialog);
  onOpen(dialog);
  dialog.showModal();
}

function isBeside({ target, clientX, clientY }) {
  if (target.nodeName !== "DIALOG") return false;
  const { left, right, top, bottom } = target.getBoundingClientRect();
  return clientX < left || clientX > right || clientY < top || clientY > bottom;
}
