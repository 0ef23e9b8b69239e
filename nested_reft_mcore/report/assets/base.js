// Small helpers: data, elements, numbers, colours. Text is only ever put in as text, never as HTML.

const byId = (id) => document.getElementById(id);

async function unpack(name) {
  const text = byId("data-" + name).textContent;
  if (!text) return null;
  const bytes = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  return JSON.parse(await new Response(stream).text());
}

function make(tag, attributes, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes || {})) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name === "style") element.style.cssText = value;
    else if (value === true) element.setAttribute(name, "");
    else if (value !== false && value != null) element.setAttribute(name, value);
  }
  element.append(...children.filter((child) => child != null));
  return element;
}

function drawn(tag, attributes, parent) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  if (parent) parent.append(element);
  return element;
}

// Okabe and Ito's colours, lighter ones on a dark ground; dashes tell runs apart without colour.
const LIGHT = ["#0072b2", "#d55e00", "#009e73", "#b0598a", "#a07400", "#3a8fc2", "#6b6b6b", "#7a5bb0", "#3f3f3f"];
const DARK = ["#56b4e9", "#f0953f", "#37c492", "#e08fbd", "#e6c229", "#8fa8ff", "#b8b8b8", "#b79cf0", "#868686"];
const DASHES = ["", "7 3", "2 3", "9 3 2 3", "4 2", "1 2", "12 4"];
const darkQuery = matchMedia("(prefers-color-scheme: dark)");
const colour = (index) => (darkQuery.matches ? DARK : LIGHT)[index % LIGHT.length];
const dash = (index) => DASHES[index % DASHES.length];

function format(value) {
  if (value == null) return "–";
  if (typeof value !== "number") return String(value);
  const size = Math.abs(value);
  if (value === 0) return "0";
  if (size >= 1e7 || size < 1e-4) return value.toExponential(2);
  if (size >= 1000) return value.toLocaleString("en", { maximumFractionDigits: 0 });
  return String(Number(value.toPrecision(4)));
}

function duration(seconds) {
  if (seconds == null) return "–";
  if (seconds < 120) return format(Math.round(seconds * 10) / 10) + " s";
  if (seconds < 7200) return Math.round(seconds / 60) + " min";
  return (seconds / 3600).toFixed(1) + " h";
}

const numbers = (values) => (values || []).filter((value) => value != null);
const sum = (values) => numbers(values).reduce((a, b) => a + b, 0);
const mean = (values) => (numbers(values).length ? sum(values) / numbers(values).length : null);
function median(values) {
  const sorted = numbers(values).sort((a, b) => a - b);
  return sorted.length ? sorted[sorted.length >> 1] : null;
}
const last = (values) => numbers(values).at(-1) ?? null;
const first = (values) => numbers(values)[0] ?? null;

// Characters that would hide, or turn the text around them, are spelled out.
const HIDDEN = new RegExp(
  "[\\u0000-\\u0008\\u000b-\\u001f\\u007f-\\u009f\\u061c\\u200b\\u200e\\u200f\\u2028-\\u202e" +
    "\\u2060-\\u206f\\ufeff]|[\\ud800-\\udbff](?![\\udc00-\\udfff])|(?<![\\ud800-\\udbff])[\\udc00-\\udfff]|\\n",
  "g");

function spelled(character) {
  const code = character.charCodeAt(0);
  if (character === "\n") return "↵\n";
  if (code < 32) return String.fromCharCode(0x2400 + code);
  return "⟨U+" + code.toString(16).toUpperCase().padStart(4, "0") + "⟩";
}

function showText(parent, text) {
  let place = 0;
  for (const match of text.matchAll(HIDDEN)) {
    parent.append(text.slice(place, match.index),
      make("span", { class: "sign" }, spelled(match[0])));
    place = match.index + match[0].length;
  }
  parent.append(text.slice(place));
  return parent;
}
const plainText = (text) => text.replace(HIDDEN, (character) => spelled(character).trim());

const tip = byId("tip");
function showTip(event, title, rows) {
  tip.replaceChildren(make("div", { class: "muted" }, title),
    make("table", {}, ...rows.map(([mark, label, value]) => make("tr", {},
      make("td", {}, mark ? make("span", { class: "swatch" }, make("i", { style: `background:${mark}` }), label) : label),
      make("td", {}, value)))));
  tip.hidden = false;
  const box = tip.getBoundingClientRect();
  const right = event.clientX + 14 + box.width < innerWidth;
  tip.style.left = Math.max(4, right ? event.clientX + 14 : event.clientX - 14 - box.width) + "px";
  tip.style.top = Math.max(4, Math.min(event.clientY + 14, innerHeight - box.height - 6)) + "px";
}
const hideTip = () => { tip.hidden = true; };
