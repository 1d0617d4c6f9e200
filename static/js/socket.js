// A websocket that comes back by itself. What was missed is asked for again in the first message.
const FIRST_DELAY_MS = 500;
const LONGEST_DELAY_MS = 15_000;
// The server speaks at least every 5 s.
const SILENCE_MS = 16_000;
const SIGNED_OUT = 4401;
const GONE = 4404;

export class LiveSocket {
  #path;
  #hello;
  #onMessage;
  #onState;
  #socket = null;
  #tries = 0;
  #timer = null;
  #heardAt = 0;
  #isOver = false;

  constructor(path, { hello, onMessage, onState }) {
    this.#path = path;
    this.#hello = hello;
    this.#onMessage = onMessage;
    this.#onState = onState;
    setInterval(() => this.#checkSilence(), 4000);
    addEventListener("online", () => this.#hurry());
    document.addEventListener("visibilitychange", () => {
      if (!document.hidden) this.#hurry();
    });
    addEventListener("pagehide", () => {
      if (this.#socket?.readyState === WebSocket.OPEN) this.#socket.close();
    });
    addEventListener("pageshow", (event) => {
      if (event.persisted) this.#hurry();
    });
    this.#connect();
  }

  send(message) {
    if (this.#socket?.readyState === WebSocket.OPEN) this.#socket.send(JSON.stringify(message));
  }

  #connect() {
    clearTimeout(this.#timer);
    this.#timer = null;
    const url = new URL(this.#path, location.href);
    url.protocol = url.protocol === "https:" ? "wss:" : "ws:";
    const socket = new WebSocket(url);
    this.#socket = socket;
    this.#heardAt = performance.now();
    socket.onopen = () => {
      socket.send(JSON.stringify(this.#hello()));
    };
    socket.onmessage = (event) => {
      if (socket !== this.#socket) return;
      this.#heardAt = performance.now();
      this.#tries = 0;
      this.#onState("live");
      this.#onMessage(JSON.parse(event.data));
    };
    socket.onclose = (event) => {
      if (socket === this.#socket) this.#onClose(event.code);
    };
  }

  #onClose(code) {
    this.#socket = null;
    if (code === SIGNED_OUT || code === GONE) {
      this.#isOver = true;
      this.#onState(code === SIGNED_OUT ? "signed out" : "gone");
      return;
    }
    this.#onState("waiting");
    const delay = Math.min(LONGEST_DELAY_MS, FIRST_DELAY_MS * 2 ** this.#tries);
    this.#tries += 1;
    // Jitter: all open pages lose the server in the same moment and must not come back in one.
    this.#timer = setTimeout(() => this.#connect(), delay * (0.5 + Math.random()));
  }

  #checkSilence() {
    if (this.#socket && performance.now() - this.#heardAt > SILENCE_MS) this.#restart();
  }

  // After sleep a socket may look open and be dead; a waiting one need not wait longer.
  #hurry() {
    if (this.#isOver) return;
    if (!this.#socket || performance.now() - this.#heardAt > SILENCE_MS / 2) this.#restart();
  }

  #restart() {
    const old = this.#socket;
    this.#socket = null;
    old?.close();
    this.#onState("waiting"); // the old one is not heard any more, and tells nothing
    this.#connect();
  }
}

const WORDS = {
  live: ["Live", "live"],
  waiting: ["Reconnecting\u2026", "waiting"],
  "signed out": ["Signed out", "ended"],
  gone: ["No longer there", "ended"],
};

export function showState(state) {
  const element = document.querySelector("[data-live-state]");
  if (!element || element.dataset.word === state) return;
  element.dataset.word = state;
  [element.textContent, element.dataset.state] = WORDS[state];
}
