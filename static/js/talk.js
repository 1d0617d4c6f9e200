// A box to talk to weights: each column is a set of weights with a conversation of its own, all are asked at once.
// Text from a model is only ever put into text nodes.
import { postForm } from "./api.js";
import { LiveSocket } from "./socket.js";
import { messagesOf, textOf } from "./talk_turns.js";
import { followWeights, offerWeights, readWeights } from "./talk_weights.js";
import { endOf, factsOf, sentence, SIGNED_OUT } from "./talk_words.js";

const SAVE_LOOK_MS = 1500;
const SAVE_LOOKS = 60;
const NEAR_END_PX = 60;

class Talk {
  #root;
  #form;
  #log;
  #groups;
  #maxColumns;
  #columns = [];
  #turns = [];
  // Asks without a last word, by id; sent again when the socket comes back.
  #open = new Map();
  // Answers that were asked for since nothing was on its way.
  #round = new Set();
  // Timers of those that are put again once weights are saved, by answer.
  #looks = new Map();
  #socket = null;
  #isReady = false;
  #isSignedOut = false;
  #number = 0;
  #numReads = 0;

  constructor(root) {
    this.#root = root;
    this.#form = this.#part("form");
    this.#log = this.#part("log");
    const { groups, columns, maxColumns } = JSON.parse(root.querySelector("#talk-settings").textContent);
    this.#groups = groups;
    this.#maxColumns = maxColumns;
    for (const value of columns) this.#addColumn(value);
    this.#listen();
    this.#showMode();
  }

  #part(name) {
    return this.#root.querySelector(`[data-talk-${name}]`);
  }

  #clone(name) {
    return this.#part(`${name}-template`).content.firstElementChild.cloneNode(true);
  }

  #listen() {
    const { message } = this.#form.elements;
    this.#form.addEventListener("submit", (event) => {
      event.preventDefault();
      this.#send();
    });
    // The browser says what is wrong at the field itself, which may be folded away.
    this.#form.addEventListener(
      "invalid",
      (event) => {
        const folded = event.target.closest("details");
        if (folded) folded.open = true;
      },
      true,
    );
    message.addEventListener("keydown", (event) => {
      if (event.key !== "Enter" || !(event.ctrlKey || event.metaKey)) return;
      event.preventDefault();
      this.#form.requestSubmit();
    });
    this.#root.addEventListener("keydown", (event) => {
      if (event.key !== "Escape" || !this.#isBusy) return;
      event.preventDefault();
      this.#stop();
    });
    this.#form.elements.mode.addEventListener("change", () => this.#showMode());
    // The connection is made when it is about to be needed, not with every page.
    this.#root.addEventListener("focusin", () => this.#connect(), { once: true });
    this.#part("stop").addEventListener("click", () => this.#stop());
    this.#part("clear").addEventListener("click", () => this.#clear());
    this.#part("add").addEventListener("click", () => this.#addColumn(this.#columns.at(-1)?.select.value));
    this.#part("copy").addEventListener("click", (event) => {
      event.currentTarget.dataset.copyText = textOf(this.#turns);
    });
    followWeights(() => this.#refreshWeights());
  }

  #showMode() {
    const isChat = this.#form.elements.mode.value === "chat";
    this.#form.elements.message.placeholder = isChat ? "Write a message" : "Write the beginning of a text";
    this.#root.querySelector(".talk-system").hidden = !isChat;
  }

  // Columns -----------------------------------------------------------------------------------------

  #addColumn(value) {
    if (this.#columns.length >= this.#maxColumns) return;
    const element = this.#clone("column");
    const column = { number: (this.#number += 1), element, select: element.querySelector("select") };
    offerWeights(column.select, this.#groups, value);
    // While it has the focus, and may be open, it is left alone.
    column.select.addEventListener("blur", () => offerWeights(column.select, this.#groups, column.select.value));
    element.querySelector(".talk-remove").addEventListener("click", () => this.#removeColumn(column));
    this.#columns.push(column);
    this.#part("columns").append(element);
    this.#showColumns();
  }

  #removeColumn(column) {
    this.#columns = this.#columns.filter((other) => other !== column);
    column.element.remove();
    this.#showColumns();
    this.#columns.at(-1).select.focus();
  }

  #showColumns() {
    this.#part("add").hidden = this.#columns.length >= this.#maxColumns;
    for (const { element } of this.#columns) element.querySelector(".talk-remove").hidden = this.#columns.length < 2;
  }

  async #refreshWeights() {
    const number = (this.#numReads += 1);
    try {
      const groups = await readWeights(this.#root.dataset.weightsUrl);
      if (number !== this.#numReads) return;
      this.#groups = groups;
    } catch {
      return; // The choices stay as they are.
    }
    for (const { select } of this.#columns) {
      if (document.activeElement !== select) offerWeights(select, this.#groups, select.value);
    }
  }

  // Questions ---------------------------------------------------------------------------------------

  #send() {
    const { message, mode, temperature, maxTokens, seed, system } = this.#form.elements;
    const said = mode.value === "chat" ? message.value.trim() : message.value;
    if (!said) {
      message.focus();
      return;
    }
    this.#say(this.#isSignedOut ? SIGNED_OUT : "");
    if (this.#isSignedOut) return;
    const settings = {
      temperature: Number(temperature.value),
      max_tokens: Number(maxTokens.value),
      seed: seed.value === "" ? crypto.getRandomValues(new Uint32Array(1))[0] >>> 1 : Number(seed.value),
    };
    const turn = { said, isChat: mode.value === "chat", answers: new Map(), element: this.#clone("turn") };
    const asks = this.#columns.map((column) => {
      const words = turn.isChat
        ? { messages: [...messagesOf(this.#turns, column.number, system.value.trim()), { role: "user", content: said }] }
        : { prompt: said };
      return { column, ask: { ...words, ...settings, targets: [JSON.parse(column.select.value)] } };
    });
    turn.element.querySelector(".talk-said").textContent = said;
    for (const { column, ask } of asks) this.#ask(turn, column, ask);
    this.#turns.push(turn);
    this.#part("empty").hidden = true;
    this.#log.append(turn.element);
    this.#log.scrollTop = this.#log.scrollHeight;
    message.value = "";
    message.focus();
  }

  #ask(turn, column, ask) {
    const element = this.#clone("answer");
    const text = document.createTextNode("");
    element.querySelector(".talk-text").append(text);
    element.querySelector(".talk-by").textContent = column.select.selectedOptions[0]?.textContent ?? "";
    const answer = { element, node: text, text: "", numLooks: 0, isStopping: false, question: ask };
    turn.answers.set(column.number, answer);
    turn.element.querySelector(".talk-answers").append(element);
    this.#submit(answer);
  }

  #submit(answer) {
    answer.id = `${(this.#number += 1)}`;
    answer.isSent = false;
    this.#open.set(answer.id, answer);
    this.#round.add(answer);
    if (this.#isSignedOut) {
      this.#giveUp(answer);
      return;
    }
    this.#setState(answer, "waiting");
    this.#connect();
    this.#flush();
    this.#showBusy();
  }

  #flush() {
    if (!this.#isReady) return;
    for (const answer of this.#open.values()) {
      if (answer.isSent) continue;
      answer.isSent = true;
      this.#socket.send({ ask: answer.id, ...answer.question });
    }
  }

  #stop() {
    for (const [id, answer] of this.#open) {
      answer.isStopping = true;
      if (answer.isSent) this.#socket.send({ stop: id });
      else this.#finish(answer, "stopped");
    }
    for (const [answer, timer] of this.#looks) {
      clearTimeout(timer);
      this.#looks.delete(answer);
      this.#finish(answer, "stopped");
    }
  }

  #clear() {
    this.#stop();
    this.#turns = [];
    this.#open.clear();
    this.#round.clear();
    for (const element of this.#log.querySelectorAll(".talk-turn")) element.remove();
    this.#part("empty").hidden = false;
    this.#showBusy();
    this.#form.elements.message.focus();
  }

  // Answers -----------------------------------------------------------------------------------------

  #connect() {
    this.#socket ??= new LiveSocket("/ws/playground/", {
      hello: () => ({ hello: true }),
      onMessage: (message) => this.#take(message),
      onState: (state) => this.#onState(state),
    });
  }

  #onState(state) {
    if (state === "live") return;
    this.#isReady = false;
    this.#isSignedOut = state === "signed out";
    if (this.#isSignedOut) this.#say(SIGNED_OUT);
    for (const answer of this.#open.values()) {
      if (answer.isStopping) this.#finish(answer, "stopped");
      else if (this.#isSignedOut) this.#giveUp(answer);
      else this.#askAnew(answer);
    }
  }

  // The server stops what a closed page asked for.
  #askAnew(answer) {
    answer.isSent = false;
    this.#note(answer, "Reconnecting\u2026");
  }

  #giveUp(answer) {
    this.#open.delete(answer.id);
    this.#setState(answer, "failed");
    this.#note(answer, SIGNED_OUT);
    this.#showBusy();
  }

  #take(message) {
    if (message.ready) {
      this.#isReady = true;
      this.#flush();
      return;
    }
    const answer = this.#open.get(message.ask);
    if (!answer) return;
    const wasAtEnd = this.#log.scrollHeight - this.#log.scrollTop - this.#log.clientHeight < NEAR_END_PX;
    this.#apply(answer, message);
    if (wasAtEnd) this.#log.scrollTop = this.#log.scrollHeight;
  }

  #apply(answer, message) {
    if (message.made_by !== undefined) {
      const step = message.step === null ? "" : `, step ${message.step}`;
      answer.element.querySelector(".talk-by").textContent = `${message.made_by}${step}`;
      answer.element.querySelector(".talk-by").title = `seed ${message.seed}`;
      this.#setText(answer, "");
      this.#note(answer, "");
    }
    if (message.waiting !== undefined) this.#note(answer, sentence(message.waiting));
    if (message.more !== undefined) this.#setText(answer, answer.text + message.more);
    if (message.text !== undefined) this.#setText(answer, message.text);
    if (message.done) this.#finish(answer, "done", message);
    if (message.error !== undefined) this.#fail(answer, message);
  }

  #setText(answer, text) {
    if (text.startsWith(answer.text)) answer.node.appendData(text.slice(answer.text.length));
    else answer.node.data = text;
    answer.text = text;
    if (text) {
      this.#setState(answer, "drawing");
      this.#note(answer, "");
    }
  }

  #finish(answer, state, facts = null) {
    this.#open.delete(answer.id);
    this.#setState(answer, state);
    this.#note(answer, state === "stopped" ? "Stopped." : answer.text ? "" : "It said nothing.");
    const end = answer.element.querySelector(".talk-end");
    if (facts) end.firstElementChild.textContent = factsOf(facts);
    end.querySelector("button").dataset.copyText = answer.text;
    end.hidden = !facts && !answer.text;
    this.#showBusy();
  }

  #fail(answer, { error, place }) {
    if (error === "stopped" || answer.isStopping) {
      this.#finish(answer, "stopped");
      return;
    }
    this.#open.delete(answer.id);
    const canSave = place === "run" && this.#root.dataset.saveUrl !== "";
    if (canSave && answer.numLooks > 0 && answer.numLooks < SAVE_LOOKS) {
      this.#lookAgain(answer);
      return;
    }
    this.#setState(answer, "failed");
    this.#note(answer, sentence(error));
    if (canSave && answer.numLooks === 0) this.#offerSave(answer);
    this.#showBusy();
  }

  // A run that trains can be asked for a checkpoint; the question is put again until it is there.
  #offerSave(answer) {
    const button = document.createElement("button");
    button.type = "button";
    button.className = "quiet-button";
    button.textContent = "Save a checkpoint now";
    button.addEventListener("click", () => this.#save(answer), { once: true });
    answer.element.querySelector(".talk-note").append(" ", button);
  }

  async #save(answer) {
    this.#setState(answer, "waiting");
    this.#note(answer, "Saving the weights\u2026");
    try {
      const token = this.#form.elements.csrfmiddlewaretoken.value;
      const { isDone, answer: reply } = await postForm(this.#root.dataset.saveUrl, { csrfmiddlewaretoken: token });
      if (!isDone) throw new Error(reply.detail);
      this.#lookAgain(answer);
    } catch (error) {
      this.#setState(answer, "failed");
      this.#note(answer, sentence(error.message));
    }
  }

  #lookAgain(answer) {
    if (!answer.element.isConnected) return; // cleared while the save was asked for
    answer.numLooks += 1;
    this.#note(answer, "Saving the weights\u2026");
    const lookNow = () => {
      this.#looks.delete(answer);
      this.#submit(answer);
    };
    this.#looks.set(answer, setTimeout(lookNow, SAVE_LOOK_MS));
    this.#showBusy();
  }

  #setState(answer, state) {
    answer.element.dataset.state = state;
  }

  #note(answer, text) {
    const note = answer.element.querySelector(".talk-note");
    note.textContent = text;
    note.hidden = !text;
  }

  #say(text) {
    const problem = this.#part("problem");
    problem.textContent = text;
    problem.hidden = !text;
  }

  get #isBusy() {
    return this.#open.size + this.#looks.size > 0;
  }

  #showBusy() {
    const isBusy = this.#isBusy;
    const status = this.#part("status");
    if (isBusy || this.#isSignedOut) status.textContent = "";
    else if (this.#round.size) status.textContent = endOf([...this.#round].map(({ element }) => element.dataset.state));
    if (!isBusy) this.#round.clear();
    this.#part("stop").hidden = !isBusy;
  }
}

for (const root of document.querySelectorAll("[data-talk]")) new Talk(root);
