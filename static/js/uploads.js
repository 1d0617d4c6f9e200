// The place where files are dropped or chosen, and the list of uploads: one at a time, the others wait.
import { filesize } from "./format.js";
import { FileUpload, forget, isRemembered, isUnchanged } from "./upload.js";

export function connectUploads(section, onEnd) {
  const list = section.querySelector("[data-upload-list]");
  const files = section.querySelector("[data-upload-files]");
  const again = section.querySelector("[data-upload-again]");
  const { endpoint, target, maxBytes } = section.dataset;
  const token = section.querySelector("[name='csrfmiddlewaretoken']").value;
  const waiting = [];
  // The lines of what was chosen since nothing was on its way.
  let batch = [];
  let isRunning = false;
  let chosen = null;

  connectDrop(section.querySelector("[data-drop]"), take);
  files.addEventListener("change", () => {
    take(files.files);
    files.value = "";
  });
  again.addEventListener("change", () => {
    if (again.files.length) goOn(chosen, again.files[0]);
    again.value = "";
  });
  list.addEventListener("click", (event) => {
    const item = event.target.closest("[data-upload]");
    if (!item || item.classList.contains("is-taken")) return;
    if (event.target.closest("[data-upload-choose]")) {
      chosen = item;
      again.click();
    } else if (event.target.closest("[data-upload-cancel]")) {
      cancel(item);
    }
  });

  // Chosen while this script was still on its way.
  if (files.files.length) files.dispatchEvent(new Event("change"));

  function take(chosenFiles) {
    if (!isRunning) batch = [];
    const wanted = target ? [...chosenFiles].slice(0, 1) : [...chosenFiles];
    const metadata = metadataOf(section, target, wanted.length);
    for (const file of wanted) begin(file, metadata);
  }

  function begin(file, metadata) {
    const known = [...list.querySelectorAll("[data-upload]:not(.is-taken)")].find(
      (item) => isSame(item, file) && (item.dataset.target ?? "") === target && isUnchanged(item.dataset.upload, file),
    );
    const item = known ?? newItem(file);
    batch.push(item);
    const problem = problemOf(file);
    if (problem) say(item, problem);
    else queue(item, file, { at: known ? addressOf(known) : "", metadata });
  }

  // A line whose button was pressed: the file must be the one that was begun.
  function goOn(item, file) {
    const { upload, filename, size } = item.dataset;
    if (!isSame(item, file)) {
      say(item, `This is ${file.name} with ${filesize(file.size)}. Choose ${filename} with ${filesize(Number(size))}.`);
    } else if (isRemembered(upload) && !isUnchanged(upload, file)) {
      say(item, "The file was changed since the upload began. Cancel this one and upload it anew.");
    } else {
      queue(item, file, { at: addressOf(item), metadata: {} });
    }
  }

  function queue(item, file, { at, metadata }) {
    item.classList.add("is-taken");
    const upload = new FileUpload(item, file, { endpoint, token, at, metadata, onEnd: ended });
    waiting.push(upload);
    if (!isRunning) runAll();
  }

  async function runAll() {
    isRunning = true;
    while (waiting.length) await waiting.shift().run();
    isRunning = false;
  }

  // Nobody is led away from a line that says what went wrong.
  function ended(result) {
    const hasFailed = batch.some((item) => item.isConnected && item.querySelector(".tone-bad"));
    onEnd({ ...result, isDone: waiting.length === 0 && !hasFailed });
  }

  function newItem(file) {
    const item = section.querySelector("[data-upload-template]").content.firstElementChild.cloneNode(true);
    item.querySelector("[data-upload-name]").textContent = file.name;
    item.querySelector("[data-upload-cancel]").onclick = () => item.remove();
    list.prepend(item);
    return item;
  }

  function problemOf(file) {
    if (file.size === 0) return "The file is empty.";
    if (file.size <= Number(maxBytes)) return "";
    return `The file has ${filesize(file.size)}; this server takes up to ${filesize(Number(maxBytes))}.`;
  }

  function addressOf(item) {
    return `${endpoint}${item.dataset.upload}`;
  }

  async function cancel(item) {
    const headers = { "tus-resumable": "1.0.0", "x-csrftoken": token };
    try {
      const response = await fetch(addressOf(item), { method: "DELETE", headers, credentials: "same-origin" });
      if (!response.ok && response.status !== 404) throw new Error(`the server answered ${response.status}`);
      forget(item.dataset.upload);
      item.remove();
    } catch (error) {
      say(item, `It could not be cancelled: ${error.message}.`);
    }
  }
}

function isSame(item, file) {
  return item.dataset.filename === file.name && Number(item.dataset.size) === file.size;
}

// A name is for one file; several keep their own.
function metadataOf(section, target, numFiles) {
  const name = numFiles === 1 ? (section.querySelector("[data-upload-title]")?.value ?? "") : "";
  const description = section.querySelector("[data-upload-description]")?.value ?? "";
  return target ? { dataset: target } : { name, description };
}

function say(item, text) {
  const said = item.querySelector("[data-upload-said]");
  said.textContent = text;
  said.classList.add("tone-bad");
  said.setAttribute("role", "alert");
}

// Files may be dropped anywhere on the page: a miss would else open the file in place of it.
function connectDrop(zone, take) {
  addEventListener("dragover", (event) => {
    if (!event.dataTransfer?.types.includes("Files")) return;
    event.preventDefault();
    zone.classList.add("is-over");
  });
  addEventListener("dragleave", (event) => {
    if (event.relatedTarget === null) zone.classList.remove("is-over");
  });
  addEventListener("drop", (event) => {
    if (!event.dataTransfer?.files.length) return;
    event.preventDefault();
    zone.classList.remove("is-over");
    take(event.dataTransfer.files);
  });
}
