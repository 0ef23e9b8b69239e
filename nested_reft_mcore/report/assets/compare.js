// Two runs at the same step: their metrics, plans and completions side by side.

const compared = { steps: [], place: 0, prompt: "" };

function startCompare() {
  byId("compare").hidden = byId("nav-compare").hidden = runs.length < 2;
  if (runs.length < 2) return;
  for (const [id, chosen] of [["c-left", 0], ["c-right", 1]]) {
    byId(id).append(...runs.map((run, i) => new Option(run.name, i, i === chosen, i === chosen)));
    byId(id).onchange = () => { setSteps(); drawCompared(); };
  }
  byId("compare-bar").onsubmit = (event) => event.preventDefault();
  byId("c-step").oninput = () => { compared.place = Number(byId("c-step").value); drawCompared(); };
  byId("c-back").onclick = () => move(-1);
  byId("c-on").onclick = () => move(1);
  setSteps();
  drawCompared();
}

const sides = () => ["c-left", "c-right"].map((id) => Number(byId(id).value));

// Steps that both have recorded; the slider stays where it was, or starts at the last.
function setSteps() {
  const [left, right] = sides().map((i) => runs[i]), before = compared.steps[compared.place];
  const known = new Set(right.steps);
  compared.steps = left.steps.filter((step) => known.has(step));
  const same = compared.steps.indexOf(before);
  compared.place = same >= 0 ? same : Math.max(0, compared.steps.length - 1);
  byId("c-step").max = Math.max(0, compared.steps.length - 1);
}

function move(by) {
  compared.place = Math.max(0, Math.min(compared.steps.length - 1, compared.place + by));
  drawCompared();
}

function drawCompared() {
  if (runs.length < 2) return;
  const parent = byId("compared"), step = compared.steps[compared.place];
  byId("c-step").value = compared.place;
  if (step == null) {
    byId("c-value").textContent = "";
    parent.replaceChildren(make("p", { class: "muted" }, "These runs have no step in common."));
    return;
  }
  byId("c-value").textContent = `step ${step}`;
  parent.replaceChildren(metricTable(step), completionsAt(step));
}

function metricTable(step) {
  const pair = sides().map((i) => runs[i]), at = pair.map((run) => run.steps.indexOf(step));
  const names = [...new Set(pair.flatMap((run) => Object.keys(run.metrics)))].sort();
  const rows = names.map((name) => {
    const [left, right] = pair.map((run, side) => run.metrics[name]?.[at[side]] ?? null);
    const gap = left == null || right == null ? null : right - left;
    const share = gap == null || !left ? "" : ` (${gap >= 0 ? "+" : ""}${format((100 * gap) / Math.abs(left))} %)`;
    return [name, format(left), format(right), gap == null ? "–" : format(gap) + share];
  }).filter((row) => row[1] !== "–" || row[2] !== "–");
  const main = new Set(CHARTS.flatMap((chart) => chart[2]));
  const head = ["", ...pair.map((run) => plainText(run.name)), "right − left"];
  const plans = pair.map((run, side) => run.plans?.[at[side]]).map((plan) => (plan ? skippedText(plan) : "–"));
  const short = rows.filter(([name]) => main.has(name) || isAccuracy(name));
  return make("div", {}, table(head, [["plan skips", ...plans, ""], ...short], true),
    make("details", {}, make("summary", {}, `All metrics of this step (${rows.length})`), table(head, rows, true)));
}

function skippedText(plan) {
  const parts = [...plan].map((cell, layer) => ["", `${layer}.attention`, `${layer}.mlp`, `${layer}`][cell]);
  return parts.filter(Boolean).join(",") || "nothing";
}

function completionsAt(step) {
  if (!sets.length) return make("p", { class: "muted" }, "Unpacking the rollouts …");
  const rows = sides().map((i) => sets[i].rows.filter((row) => row.step === step));
  // Completions of training and of each evaluation are compared with their like.
  const nameOf = (row) => (row.kind ? `${row.kind}: ` : "") + row.promptText;
  const shared = [...new Set(rows[0].map(nameOf))].filter((name) => rows[1].some((row) => nameOf(row) === name));
  if (!shared.length) {
    const counts = rows.map((some) => some.length).join(" and ");
    return make("p", { class: "muted" }, `The page holds ${counts} rollouts of this step, and none of the same prompt.`);
  }
  if (!shared.includes(compared.prompt)) compared.prompt = shared[0];
  const choice = make("select", { onchange: () => { compared.prompt = shared[Number(choice.value)]; drawCompared(); } },
    ...shared.map((text, i) => new Option(plainText(text).slice(0, 90), i)));
  choice.value = shared.indexOf(compared.prompt);
  return make("div", {}, make("h3", {}, "Completions of the same prompt"), make("label", {}, "prompt ", choice),
    make("div", { class: "sides" }, ...rows.map((some) => side(some.filter((row) => nameOf(row) === compared.prompt)))));
}

function side(rows) {
  const article = make("article", {});
  const show = (row) => article.replaceChildren(make("div", { class: "siblings" }, ...rows.map((other) =>
    make("button", { type: "button", "aria-current": String(other === row), onclick: () => show(other) }, `${other.sample} · ${rewardText(other)}`))),
    ...rolloutParts(row, false));
  show(rows[0]);
  return article;
}
