// The list of datasets: uploads, and checks as they go on.
import { Polling } from "./polling.js";
import { connectUploads } from "./uploads.js";

const polling = new Polling();
connectUploads(document.querySelector("[data-uploads]"), ({ url, isKnown, isDone }) => {
  if (isDone && url && !isKnown) location.assign(url);
  else polling.now();
});
