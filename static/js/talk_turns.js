// A conversation, turn by turn, as messages and as text.

// What a column has said so far; where it was not there, what the first one said.
export function messagesOf(turns, column, system) {
  const messages = system ? [{ role: "system", content: system }] : [];
  for (const turn of turns) {
    const answer = turn.answers.get(column) ?? [...turn.answers.values()][0];
    if (!turn.isChat || !answer?.text) continue;
    messages.push({ role: "user", content: turn.said }, { role: "assistant", content: answer.text });
  }
  return messages;
}

export function textOf(turns) {
  const answersOf = (turn) =>
    [...turn.answers.values()].map(({ element, text }) => `[${element.querySelector(".talk-by").textContent}]\n${text}`);
  return turns.map((turn) => [`[you]\n${turn.said}`, ...answersOf(turn)].join("\n\n")).join("\n\n");
}
