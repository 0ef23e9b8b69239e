// The rollout browser: filters, a list, and one rollout with its tokens coloured.

const FAILURES = { "": "any way", well: "well", failed: "badly, in any way", truncated: "truncated", timeout: "judge timed out", error: "judge failed", nan: "not a number" };
const SCALES = [1.02, 1.05, 1.1, 1.25, 1.5, 2, 4, 10];
const PAGE = 50;
let sets = [];
const view = { page: 0, kinds: [], matches: [], chosen: null, scale: null };

// Columns to rows, once; a row knows its run.
function rowsOf(set, index) {
  const names = Object.keys(set.columns), count = names.length ? set.columns.step.length : 0;
  return Array.from({ length: count }, (_, i) => {
    const row = { index, id: `${index}.${i}` };
    for (const name of names) row[name] = set.columns[name][i];
    row.promptText = set.prompts[row.prompt];
    row.planText = set.plans[row.plan];
    return row;
  });
}

function startBrowser(data) {
  sets = data.map((set, index) => ({ ...set, rows: rowsOf(set, index) }));
  sayWhatIsShown();
  const all = sets.flatMap((set) => set.rows);
  if (!all.length) return;
  byId("f-run").append(...(runs.length > 1 ? [new Option("all", "")] : []),
    ...runs.map((run, i) => new Option(run.name, i)));
  const kinds = [...new Set(all.map((row) => row.kind))].sort();
  byId("f-kind").append(new Option("all", ""), ...kinds.map((kind, i) => new Option(kind || "training", i)));
  byId("f-kind").parentElement.hidden = kinds.length < 2;
  view.kinds = kinds;
  const there = new Set(all.map((row) => row.failure));
  byId("f-failure").append(...Object.entries(FAILURES)
    .filter(([key]) => ["", "well", "failed"].includes(key) || there.has(key)).map(([key, label]) => new Option(label, key)));
  byId("filters").hidden = byId("browser").hidden = false;
  byId("filters").onsubmit = (event) => event.preventDefault();
  let timer = 0;
  byId("filters").oninput = () => { clearTimeout(timer); timer = setTimeout(() => { view.page = 0; listRows(); }, 120); };
  byId("previous").onclick = () => { view.page--; listRows(); };
  byId("next").onclick = () => { view.page++; listRows(); };
  listRows();
}

function sayWhatIsShown() {
  const lines = sets.map((set, i) => {
    const { all, ...others } = set.counts;
    if (!all) return `${plainText(runs[i].name)}: no rollouts were dumped.`;
    const part = ([name, [shown, there]]) => `${name} ${shown.toLocaleString("en")} of ${there.toLocaleString("en")}`;
    const broken = set.num_broken ? ` ${set.num_broken} lines could not be read.` : "";
    return `${plainText(runs[i].name)}: ${all[0].toLocaleString("en")} of ${all[1].toLocaleString("en")} rollouts are in this page` +
      (all[0] < all[1] ? ` (${Object.entries(others).map(part).join(", ")}; the extremes, failures and the newest first, the others spread evenly over steps).` : ".") + broken;
  });
  byId("sampling").replaceChildren(...lines.flatMap((line, i) => (i ? [make("br"), line] : [line])));
}

const ORDERS = {
  newest: (a, b) => b.step - a.step, oldest: (a, b) => a.step - b.step,
  best: (a, b) => b.reward - a.reward, worst: (a, b) => a.reward - b.reward,
  ratio: (a, b) => Math.abs(b.mean) - Math.abs(a.mean), longest: (a, b) => b.num_tokens - a.num_tokens,
};

function matching() {
  const value = (id) => byId(id).value;
  const bound = (id, otherwise) => (value(id) === "" ? otherwise : Number(value(id)));
  const from = bound("f-from", -Infinity), to = bound("f-to", Infinity);
  const low = bound("f-low", -Infinity), high = bound("f-high", Infinity);
  const failure = value("f-failure"), text = value("f-text").toLowerCase();
  const some = value("f-run") === "" ? sets : [sets[Number(value("f-run"))]];
  const suits = (row) => failure === "" || (failure === "well" ? !row.failure : failure === "failed" ? row.failure : row.failure === failure);
  const kind = value("f-kind") === "" ? null : view.kinds[Number(value("f-kind"))];
  return some.flatMap((set) => set.rows).filter((row) => (kind == null || row.kind === kind) &&
    row.step >= from && row.step <= to && (row.reward ?? 0) >= low && (row.reward ?? 0) <= high && suits(row) &&
    (!text || row.completion.toLowerCase().includes(text) || row.promptText.toLowerCase().includes(text)))
    .sort((a, b) => ORDERS[value("f-order")](a, b) || a.step - b.step);
}

const rewardText = (row) => "reward " + format(row.reward);
const ratioText = (row) => (row.ratios ? "ratio " + format(Math.exp(row.mean)) : "");

function listRows() {
  view.matches = matching();
  const pages = Math.max(1, Math.ceil(view.matches.length / PAGE));
  view.page = Math.max(0, Math.min(view.page, pages - 1));
  const shown = view.matches.slice(view.page * PAGE, (view.page + 1) * PAGE);
  const kept = sum(sets.map((set) => set.rows.length));
  byId("matches").textContent = `${view.matches.length.toLocaleString("en")} of ${kept.toLocaleString("en")} match` + (pages > 1 ? `, page ${view.page + 1} of ${pages}` : "");
  byId("list").replaceChildren(...shown.map((row) => make("li", {}, make("button",
    { type: "button", "data-row": row.id, "aria-current": String(row === view.chosen), onclick: () => showRollout(row) },
    make("span", { class: "line" }, runs.length > 1 ? make("i", { style: `width:.7rem;height:.7rem;border-radius:2px;background:${colour(row.index)}` }) : null,
      `step ${row.step}`, make("span", { class: "badge" }, rewardText(row)), row.failure ? make("span", { class: "badge failed" }, row.failure) : null,
      row.kind ? make("span", { class: "badge" }, plainText(row.kind)) : null,
      make("span", {}, `${row.num_tokens} tokens`), make("span", {}, ratioText(row))),
    make("span", { class: "text" }, plainText(row.completion.slice(0, 160)) || "(empty)")))));
  byId("previous").disabled = view.page === 0;
  byId("next").disabled = view.page >= pages - 1;
  if (shown.length && !shown.includes(view.chosen)) showRollout(shown[0]);
  if (!shown.length) byId("detail").replaceChildren(make("p", { class: "muted" }, "No rollout matches the filters."));
}

function showRollout(row) {
  view.chosen = row;
  for (const button of byId("list").querySelectorAll("button")) button.setAttribute("aria-current", String(button.dataset.row === row.id));
  const group = sets[row.index].rows.filter((other) => other.step === row.step && other.prompt_index === row.prompt_index && other.kind === row.kind);
  byId("detail").replaceChildren(...rolloutParts(row, true), ...(group.length > 1 ? [make("h3", {}, "Other samples of this prompt"),
    make("div", { class: "siblings" }, ...group.map((other) => make("button", { type: "button", "aria-current": String(other === row), onclick: () => showRollout(other) },
      `${other.sample} · ${rewardText(other)}`)))] : []));
}

// What is shown of a rollout: facts, prompt, completion with its scale.
function rolloutParts(row, withPrompt) {
  const facts = [["run", plainText(runs[row.index].name)], ...(row.kind ? [["evaluation", plainText(row.kind)]] : []), ["step", `${row.step}, prompt ${row.prompt_index}, sample ${row.sample}`],
    ["reward", format(row.reward) + (row.advantage == null ? "" : `, advantage ${format(row.advantage)}`)],
    ...(row.components ? [["of it", Object.entries(row.components).map(([name, value]) => `${plainText(name)} ${value == null ? "–" : format(value)}`).join(", ")]] : []),
    ["expected answer", row.answer == null ? "–" : plainText(row.answer)],
    ["ended", row.failure ? `${FAILURES[row.failure]} (${plainText(String(row.reason))})` : plainText(String(row.reason))],
    ["plan skips", plainText(row.planText || "nothing")],
    ["importance ratio", row.ratios ? `geometric mean ${format(Math.exp(row.mean))}, ${row.num_tokens} tokens` : row.kind ? `not recorded in an evaluation, ${row.num_tokens} tokens` : "not recorded: the rollout was masked, or dumped by an earlier version"],
    ["source", plainText(row.source || "–")]];
  const list = make("dl", { class: "facts" }, ...facts.flatMap(([name, value]) => [make("dt", {}, name), make("dd", {}, value)]));
  const block = make("div", { class: "text-block completion" });
  const scale = scaleBar(row, () => fillTokens(block, row));
  fillTokens(block, row);
  return [list, ...(withPrompt ? [make("h3", {}, "Prompt"), showText(make("div", { class: "text-block" }), row.promptText)] : []),
    make("h3", {}, "Completion"), ...(scale ? [scale] : []), block];
}

function usedScale(row) {
  if (view.scale) return view.scale;
  const sizes = numbers(row.ratios).map(Math.abs).sort((a, b) => a - b);
  const high = Math.exp((sizes[Math.floor(0.98 * (sizes.length - 1))] || 0) / 100);
  return SCALES.find((scale) => scale >= high) || SCALES.at(-1);
}

// Orange where the full policy finds a token less likely than the one that wrote it, blue where more.
function tint(logRatio, scale) {
  const share = Math.max(-1, Math.min(1, logRatio / Math.log(scale)));
  const hue = share < 0 ? "213,94,0" : darkQuery.matches ? "86,180,233" : "0,114,178";
  return `rgba(${hue},${(0.62 * Math.abs(share)).toFixed(3)})`;
}

function scaleBar(row, again) {
  if (!row.ratios) return null;
  const ramp = make("span", { class: "ramp" }), low = make("span"), high = make("span");
  const paint = () => {
    const scale = usedScale(row), stops = [-1, -0.5, 0, 0.5, 1].map((k) => tint(k * Math.log(scale), scale));
    ramp.style.background = `linear-gradient(to right, ${stops.join(",")})`;
    low.textContent = "≤ 1/" + scale;
    high.textContent = "≥ " + scale;
  };
  const choice = make("select", { "aria-label": "scale of the colours", onchange: () => { view.scale = Number(choice.value) || null; paint(); again(); } },
    new Option("scale: fitted", ""), ...SCALES.map((scale) => new Option(`scale: 1/${scale} to ${scale}`, scale)));
  choice.value = view.scale || "";
  paint();
  return make("div", { class: "scale" }, "importance ratio, target / behavior", low, ramp, high, choice);
}

function fillTokens(block, row) {
  block.replaceChildren();
  if (!row.lengths) {
    showText(block, row.completion);
    if (row.ratios) block.append("\n", ...row.ratios.map((_, i) => token(row, i, "▮", "token")),
      make("span", { class: "sign" }, " one mark a token: the text could not be cut into tokens"));
    return;
  }
  let place = 0;
  row.lengths.forEach((length, i) => {
    const text = row.completion.slice(place, place + length);
    place += length;
    block.append(length ? token(row, i, text, "token") : token(row, i, "∅", "token silent"));
  });
  if (place < row.completion.length) showText(block, row.completion.slice(place));
}

function token(row, i, text, kind) {
  const ratio = row.ratios?.[i];
  const span = make("span", { class: kind + (row.ratios && ratio == null ? " unknown" : "") });
  if (ratio != null) span.style.background = tint(ratio / 100, usedScale(row));
  span.onpointermove = (event) => showTip(event, `token ${i + 1} of ${row.num_tokens}${kind.includes("silent") ? ", without text of its own" : ""}`, [
    [null, "importance ratio", ratio == null ? "–" : format(Math.exp(ratio / 100))],
    [null, "log ratio, nats", ratio == null ? "–" : format(ratio / 100)],
    [null, "behavior log-prob, nats", row.logprobs[i] == null ? "–" : format(row.logprobs[i] / 100)]]);
  span.onpointerleave = hideTip;
  return showText(span, text);
}
