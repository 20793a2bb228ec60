// Small helpers: elements, numbers for people.

export const $ = (id) => document.getElementById(id);

/** An element with attributes, listeners (on…) and children; properties that begin with a dot are set. */
export function el(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === undefined || value === null || value === false) continue;
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (name.startsWith(".")) node[name.slice(1)] = value;
    else node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return node;
}

export function icon(name) {
  const space = "http://www.w3.org/2000/svg";
  const svg = document.createElementNS(space, "svg");
  const use = document.createElementNS(space, "use");
  use.setAttribute("href", `#i-${name}`);
  svg.setAttribute("aria-hidden", "true");
  svg.append(use);
  return svg;
}

/** Bytes as tightfit writes them: "212 MiB", "3.65 GiB". */
export function bytes(count) {
  if (count < 2 ** 15) return `${Math.round(count)} bytes`;
  const mib = count / 2 ** 20;
  if (mib < 10) return `${mib.toFixed(1)} MiB`;
  return mib < 1000 ? `${Math.round(mib)} MiB` : `${(mib / 1024).toFixed(2)} GiB`;
}

/** Bytes that a plan needs in all: what it holds, and the process or the device's context besides. */
export const peak = (predicted) => predicted.peak_bytes + predicted.context_bytes;

/** Seconds for people: "0.3 s", "12 s", "4 min 10 s". */
export function seconds(count) {
  if (count < 9.95) return `${count.toFixed(1)} s`;
  const whole = Math.round(count);
  if (whole < 100) return `${whole} s`;
  const minutes = Math.floor(whole / 60);
  if (minutes < 100) return `${minutes} min ${whole % 60} s`;
  return `${Math.floor(minutes / 60)} h ${minutes % 60} min`;
}

export const pause = (milliseconds) => new Promise((resolve) => { setTimeout(resolve, milliseconds); });

/** A select's options: [value, label] pairs, or {label, options} groups. */
export function choices(select, entries, chosen) {
  const option = ([value, label, disabled]) => el("option", { value, disabled, ".selected": value === chosen }, label);
  select.replaceChildren(...entries.map((entry) =>
    Array.isArray(entry) ? option(entry) : el("optgroup", { label: entry.label }, entry.options.map(option))));
}
