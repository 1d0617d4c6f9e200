// What the box that talks to weights says itself.
const ENDS = { stop: "ended by itself", length: "reached the longest answer" };
export const SIGNED_OUT = "You are signed out; reload the page.";

export function factsOf({ num_tokens: numTokens, seconds, stop_reason: reason }) {
  const rate = seconds > 0 ? `, ${(numTokens / seconds).toFixed(numTokens / seconds < 10 ? 1 : 0)} a second` : "";
  return `${numTokens} ${numTokens === 1 ? "token" : "tokens"}${rate}, ${ENDS[reason]}`;
}

// What became of answers, by their states.
export function endOf(states) {
  const numFailed = states.filter((state) => state === "failed").length;
  const words = [];
  if (numFailed) words.push(`${numFailed === states.length ? numFailed : `${numFailed} of ${states.length}`} ${states.length === 1 ? "answer" : "answers"} failed.`);
  if (states.includes("stopped")) words.push("Stopped.");
  return words.join(" ") || (states.length ? "All answers are there." : "");
}

export function sentence(text) {
  const first = text.charAt(0).toUpperCase() + text.slice(1);
  return /[.!?\u2026]$/.test(first) ? first : `${first}.`;
}
