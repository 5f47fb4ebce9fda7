// What comes from the broker may be anything: these give a value of the right type, or null.

export const text = (value) => (typeof value === "string" ? value : null);
export const number = (value) => (Number.isFinite(value) && Math.abs(value) < 1e15 ? value : null);
export const list = (value) => (Array.isArray(value) ? value : []);
export const texts = (value) => list(value).filter((item) => typeof item === "string");
export const object = (value) =>
  value !== null && typeof value === "object" && !Array.isArray(value) ? value : {};

// "–" is shown for what a board cannot tell.
export const UNKNOWN = "–";

export function figure(value, digits = 1, unit = "") {
  const known = number(value);
  return known === null ? UNKNOWN : `${known.toFixed(digits)}${unit && ` ${unit}`}`;
}

// The same words as `nestd watch`: `39 MB`, `2.31 GB`.
export function bytes(value) {
  let size = number(value);
  if (size === null) return UNKNOWN;
  for (const unit of ["B", "KB", "MB"]) {
    if (Math.abs(size) < 1000) return `${size.toFixed(0)} ${unit}`;
    size /= 1024;
  }
  return `${size.toFixed(2)} GB`;
}

export function duration(value) {
  const seconds = number(value);
  if (seconds === null) return UNKNOWN;
  const [days, hours, minutes] = [seconds / 86400, (seconds / 3600) % 24, (seconds / 60) % 60].map(Math.floor);
  if (days) return `${days} d ${hours} h`;
  if (hours) return `${hours} h ${minutes} min`;
  return minutes ? `${minutes} min` : `${Math.floor(seconds)} s`;
}

// An id that nobody else has; crypto.randomUUID is there on secure pages only.
export function newId() {
  return Array.from(crypto.getRandomValues(new Uint8Array(16)), (byte) => byte.toString(16).padStart(2, "0")).join("");
}
