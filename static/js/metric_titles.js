// The names of metrics in the words of a page.
const TITLES = {
  loss: "Loss per token",
  learning_rate: "Learning rate",
  grad_norm: "Gradient norm",
  tokens_per_s: "Tokens per second",
  step_time_s: "Compute time of a step in seconds",
  client_gap_s: "Waiting for the client in seconds",
  queue_wait_s: "Waiting in the queue in seconds",
  loss_sum: "Loss, summed",
  tokens: "Tokens of a step",
};

const OF_DATASET = "validation_loss/";

export function titleOf(name) {
  if (name.startsWith(OF_DATASET)) return `Validation loss: ${name.slice(OF_DATASET.length)}`;
  return TITLES[name] ?? name;
}

// Which end of a metric is the good one: its lowest or its highest value; "" where neither is.
export function bestOf(name) {
  if (/loss|perplexity|error/i.test(name)) return "lowest";
  if (/reward|accura|margin|score|tokens_per_s/i.test(name)) return "highest";
  return "";
}
