// One file on its way to the server by tus, and the line of the list that shows it.
import { getJson } from "./api.js";
import { duration, filesize } from "./format.js";
import { Pace } from "./upload_pace.js";

// A piece is at most this large; the file is read from disk piece by piece.
const PIECE_BYTES = 32 * 2 ** 20;
// Together a good ten minutes: a server that is restarted or updated is waited for.
const RETRY_MS = [0, 500, 1000, 2000, 3000, 5000, 8000, ...Array(40).fill(15_000)];
const REPEATED = new Set([0, 408, 409, 423, 425, 429, 460]);
const REMEMBERED = "uploads";

export class FileUpload {
  #item;
  #file;
  #upload;
  #pace = new Pace();
  #offset = 0;
  #state = "waiting";
  #isCancelled = false;
  #onEnd = () => {};
  #finish = () => {};

  // `at` is the address of an upload to go on with, "" for a new one.
  constructor(item, file, { endpoint, token, metadata, at, onEnd }) {
    this.#item = item;
    this.#file = file;
    this.#onEnd = onEnd;
    this.#upload = new window.tus.Upload(file, {
      endpoint,
      uploadUrl: at || null,
      headers: { "X-CSRFToken": token },
      metadata: { filename: file.name, ...metadata },
      chunkSize: PIECE_BYTES,
      retryDelays: RETRY_MS,
      storeFingerprintForResuming: false,
      onProgress: (sent) => this.#onProgress(sent),
      onShouldRetry: (error) => this.#shouldRetry(error),
      onUploadUrlAvailable: () => this.#onAddress(),
      onError: (error) => this.#onError(error),
      onSuccess: () => this.#onSuccess(),
    });
    this.#part("name").textContent = file.name;
    this.#part("choose").hidden = true;
    this.#part("pause").onclick = () => this.pause();
    this.#part("resume").onclick = () => this.start();
    this.#part("cancel").onclick = () => this.cancel();
    this.#say("Waits for the upload before it.");
    addEventListener("online", () => {
      if (this.#state === "offline") this.start();
    });
  }

  // Resolves when the file is there, refused or cancelled; a paused one goes on being waited for.
  run() {
    return new Promise((resolve) => {
      this.#finish = resolve;
      if (this.#isCancelled) resolve();
      else this.start();
    });
  }

  start() {
    this.#pace = new Pace();
    this.#setState("running");
    this.#say("Starting.");
    this.#upload.start();
  }

  pause() {
    this.#upload.abort();
    this.#setState("paused");
    this.#say(`Paused at ${this.#amount()}.`);
  }

  async cancel() {
    this.#isCancelled = true;
    this.#setState("ended");
    try {
      await this.#upload.abort(this.#upload.url !== null);
    } catch {
      // It is gone, or expires by itself.
    }
    forget(idOf(this.#upload.url));
    this.#item.remove();
    this.#finish();
  }

  #onAddress() {
    const id = idOf(this.#upload.url);
    this.#item.dataset.upload = id;
    remember(id, this.#file);
  }

  #onProgress(sent) {
    if (this.#state !== "running") return;
    this.#offset = sent;
    this.#pace.add(sent, performance.now());
    this.#part("progress").value = sent / this.#file.size;
    const speed = this.#pace.speed();
    const left = this.#pace.secondsFor(this.#file.size - sent);
    const rate = speed ? `, ${filesize(speed)}/s` : "";
    this.#say(`${this.#amount()}${rate}${left ? `, ${duration(left)} left` : ""}`);
  }

  #shouldRetry(error) {
    const status = error.originalResponse?.getStatus() ?? 0;
    const isRepeated = REPEATED.has(status) || (status >= 500 && status !== 507);
    if (isRepeated && navigator.onLine) this.#say("The server does not answer just now; trying again.");
    return isRepeated && navigator.onLine;
  }

  #onError(error) {
    const response = error.originalResponse;
    if (!response && !navigator.onLine) {
      this.#setState("offline");
      this.#say(`No connection; goes on from ${this.#amount()} when it is back.`);
      return;
    }
    this.#setState("stopped");
    this.#say(reasonOf(response) ?? "The server does not answer. Go on when it is back.", true);
    this.#finish();
  }

  async #onSuccess() {
    this.#setState("ended");
    this.#part("cancel").hidden = true;
    this.#part("progress").value = 1;
    this.#say("The file is here.");
    forget(idOf(this.#upload.url));
    try {
      const { version } = await getJson(this.#upload.url);
      if (version.problem) this.#refuse(version.problem);
      else if (version.is_known) this.#link("This file was uploaded before: ", "see it", version.url);
      else this.#link("The file is here: ", "see what was found in it", version.url);
      this.#onEnd({ url: version.url, isKnown: version.is_known });
    } catch {
      this.#onEnd({ url: "", isKnown: false });
    }
    this.#finish();
  }

  #setState(state) {
    this.#state = state;
    this.#part("pause").hidden = state !== "running";
    this.#part("resume").hidden = state !== "paused" && state !== "stopped" && state !== "offline";
    this.#item.classList.toggle("is-running", state === "running");
  }

  #amount() {
    return `${filesize(this.#offset)} of ${filesize(this.#file.size)}`;
  }

  #say(text, isBad = false) {
    const said = this.#part("said");
    said.textContent = text;
    said.classList.toggle("tone-bad", isBad);
    // Progress is not read out, what went wrong is.
    if (isBad) said.setAttribute("role", "alert");
    else said.removeAttribute("role");
  }

  #link(before, text, url) {
    this.#part("said").replaceChildren(before, linkTo(url, text));
  }

  // The dataset holds the content, but reads it in another way than somebody wants.
  #refuse(problem) {
    this.#say(sentence(problem), true);
    this.#part("said").append(" ", linkTo("/datasets/", "Go to the datasets"));
  }

  #part(name) {
    return this.#item.querySelector(`[data-upload-${name}]`);
  }
}

function reasonOf(response) {
  if (!response) return null;
  if (response.getStatus() === 401) return "You are signed out. Sign in again and choose the file again to go on.";
  try {
    const { detail } = JSON.parse(response.getBody());
    return sentence(detail);
  } catch {
    return `The server answered ${response.getStatus()}.`;
  }
}

function sentence(text) {
  return `${text.charAt(0).toUpperCase()}${text.slice(1)}.`;
}

function linkTo(url, text) {
  const link = document.createElement("a");
  link.href = url;
  link.textContent = text;
  return link;
}

function idOf(url) {
  return url ? url.split("/").at(-1) : "";
}

// A file is taken for the one that was begun only if it was not changed since.
export function isUnchanged(id, file) {
  return remembered()[id] === file.lastModified;
}

export function isRemembered(id) {
  return id in remembered();
}

function remember(id, file) {
  keep({ ...remembered(), [id]: file.lastModified });
}

export function forget(id) {
  const { [id]: gone, ...others } = remembered();
  if (gone !== undefined) keep(others);
}

function remembered() {
  try {
    return JSON.parse(localStorage.getItem(REMEMBERED)) ?? {};
  } catch {
    return {};
  }
}

function keep(uploads) {
  try {
    localStorage.setItem(REMEMBERED, JSON.stringify(uploads));
  } catch {
    // Then the same file begins anew after a reload, unless it is chosen for its own line.
  }
}
