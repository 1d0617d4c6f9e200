// Numbers and times in the words of the pages; runs/templatetags/formats.py says the same.
const NOTHING = "\u2013";
const THIN = "\u202f";

export function count(value) {
  return value === null || value === undefined ? NOTHING : String(Math.round(value)).replace(/\B(?=(\d{3})+(?!\d))/g, THIN);
}

export function decimal(value) {
  if (value === null || value === undefined) return NOTHING;
  if (Number.isNaN(value)) return "NaN";
  if (!Number.isFinite(value)) return value > 0 ? "\u221e" : "-\u221e";
  if (value === 0) return "0";
  const size = Math.abs(value);
  if (size < 0.001 || size >= 100_000) return value.toExponential(3);
  return value.toPrecision(4);
}

export function filesize(bytes) {
  let size = bytes;
  for (const unit of ["B", "kB", "MB", "GB"]) {
    if (size < 1000) return `${unit === "B" || size >= 100 ? size.toFixed(0) : size.toFixed(1)} ${unit}`;
    size /= 1000;
  }
  return `${size.toFixed(1)} TB`;
}

export function duration(seconds) {
  if (seconds < 60) return `${Math.max(1, Math.round(seconds))} s`;
  if (seconds < 3600) return `${Math.floor(seconds / 60)} min ${Math.floor(seconds % 60)} s`;
  return `${Math.floor(seconds / 3600)} h ${Math.floor((seconds % 3600) / 60)} min`;
}

// A label on an axis: as short as the distance between labels allows.
export function tick(value, step) {
  const size = Math.max(Math.abs(value), Math.abs(step));
  if (value === 0) return "0";
  if (size >= 1e6 || Math.abs(step) < 1e-4) return value.toExponential(Math.min(2, significant(value, step))).replace("e+", "e");
  if (size >= 10_000) return `${Number((value / 1000).toFixed(2))}k`;
  const digits = Math.max(0, Math.ceil(-Math.log10(Math.abs(step) || 1) - 1e-9));
  return value.toFixed(Math.min(digits, 6));
}

function significant(value, step) {
  return Math.max(0, Math.round(Math.log10(Math.abs(value) / (Math.abs(step) || 1))));
}

const UNITS = [[86_400, "d"], [3_600, "h"], [60, "min"]];

export function ago(moment, now) {
  const seconds = (now - moment.getTime()) / 1000;
  const size = Math.abs(seconds);
  if (size < 45) return seconds >= 0 ? "just now" : "in a moment";
  const [length, unit] = UNITS.find(([length]) => size >= length * 0.75);
  const number = Math.round(size / length);
  return seconds > 0 ? `${number} ${unit} ago` : `in ${number} ${unit}`;
}

export function clock(seconds) {
  const moment = new Date(seconds * 1000).toLocaleString(undefined, {
    month: "short", day: "numeric", hour: "2-digit", minute: "2-digit", second: "2-digit", hourCycle: "h23",
  });
  return `${moment} ${zone(seconds)}`;
}

// The zone of a time on the charts, which is that of whoever looks; elsewhere on the pages times are UTC, and say so.
function zone(seconds) {
  const minutes = -new Date(seconds * 1000).getTimezoneOffset();
  if (!minutes) return "UTC";
  const [hours, rest] = [Math.floor(Math.abs(minutes) / 60), Math.abs(minutes) % 60];
  return `UTC${minutes < 0 ? "\u2212" : "+"}${hours}${rest ? `:${String(rest).padStart(2, "0")}` : ""}`;
}

// What an axis of time is called; summer time may begin or end on it.
export function timeTitle(from, to) {
  const [first, last] = [zone(from), zone(to)];
  return `time (${first === last ? first : `${first} to ${last}`})`;
}

// Labels of a time axis, as short as their distance allows; the day is said where it changes.
export function timeLabels(ticks) {
  const step = ticks.length > 1 ? ticks[1] - ticks[0] : 60;
  const time = { hour: "2-digit", minute: "2-digit", hourCycle: "h23", ...(step < 60 && { second: "2-digit" }) };
  return ticks.map((seconds) => {
    const moment = new Date(seconds * 1000);
    const isMidnight = moment.getHours() === 0 && moment.getMinutes() === 0 && moment.getSeconds() === 0;
    if (step >= 86_400 || isMidnight) return moment.toLocaleDateString(undefined, { month: "short", day: "numeric" });
    return moment.toLocaleTimeString(undefined, time);
  });
}
