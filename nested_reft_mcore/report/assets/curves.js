// What was run, and every curve of it.

const CHARTS = [
  ["Reward", "mean of the batch", ["critic/rewards/mean"]],
  ["Score before shaping", "mean of the batch", ["critic/score/mean"]],
  ["Loss of the warm-up", "nats per token", ["sft/loss"]],
  ["Response length", "tokens, mean", ["response_length/mean"]],
  ["Truncated responses", "share", ["response_length/clip_ratio"]],
  ["Generation", "tokens per second", ["perf/generated_tokens_per_second"]],
  ["Throughput", "tokens per second and process", ["perf/throughput"]],
  ["KL, behavior to target", "nats per token", ["rollout_corr/kl"]],
  ["Where the KL comes from", "nats per token", ["nested/kl_skip", "nested/kl_engine", "nested/kl_stale"]],
  ["Effective sample size", "share of the tokens", ["nested/ess"]],
  ["5th percentile of min(r, 1/r)", "ratio r = target / behavior", ["nested/ratio_p05"]],
  ["Layers skipped", "layers or parts", ["nested/num_skipped"]],
  ["Accepted drafts", "share of the drafted tokens", ["nested/accept_rate"]],
  ["Entropy", "nats per token", ["actor/entropy"]],
  ["Gradient norm", "before clipping", ["actor/grad_norm"]],
  ["Skipped updates, timeouts, errors", "count so far", ["training/skipped_updates", "reward/timeouts", "reward/errors"]],
];
// Label, metric, colour: a phase looks the same in every run.
const PHASES = [
  ["generation", "timing_s/gen", 0], ["reward", "timing_s/reward", 4], ["old log-probs", "timing_s/old_log_prob", 2],
  ["reference", "timing_s/ref", 5], ["update", "timing_s/update_actor", 1], ["diagnostics", "timing_s/diagnostics", 7],
];
const AROUND = [["evaluation", "timing_s/testing", 3], ["saving", "timing_s/save_checkpoint", 8]];

const isAccuracy = (name) => name.startsWith("val-core/");
const has = (run, name) => numbers(run.metrics[name]).length > 0;

function seriesOf(names) {
  return runs.flatMap((run, index) => names.filter((name) => has(run, name)).map((name, k) => ({
    run, index, values: run.metrics[name], dash: names.length > 1 ? DASHES[k] : dash(index),
    label: names.length > 1 ? `${run.name} · ${name.split("/").pop()}` : run.name,
    intervals: run.intervals[name],
  })));
}

function dashLegend(names) {
  if (names.length < 2) return null;
  return make("span", { class: "swatches" }, ...names.map((name, k) => {
    const line = drawn("svg", { width: 22, height: 8, style: "width:22px;display:inline" });
    drawn("line", { x1: 0, x2: 22, y1: 4, y2: 4, stroke: "currentColor", "stroke-width": 1.8, "stroke-dasharray": DASHES[k] }, line);
    return make("span", { class: "swatch" }, line, name.split("/").pop());
  }));
}

function drawCurves() {
  const charts = byId("charts"), there = new Set(runs.flatMap((run) => Object.keys(run.metrics)));
  const add = (title, unit, names) => {
    const series = seriesOf(names);
    const used = names.filter((name) => series.some((one) => has(one.run, name)));
    if (series.length) charts.append(lineChart(title, unit, series, dashLegend(used.length > 1 ? names : [])));
  };
  const [reward, ...others] = CHARTS;
  add(...reward);
  for (const name of [...there].filter(isAccuracy).sort()) {
    const [, data, kind, ...statistic] = name.split("/");
    const what = kind === "reward" ? "accuracy" : kind;
    add(`Evaluation: ${statistic.join("/") || what}`, `${what} on ${data}, 95 % interval`, [name]);
  }
  for (const chart of others) {
    const isCopy = chart[2][0] === "critic/score/mean" && runs.every((run) =>
      String(run.metrics["critic/score/mean"]) === String(run.metrics["critic/rewards/mean"]));
    if (!isCopy) add(...chart);
  }
  if (!charts.children.length) charts.append(make("p", { class: "muted" }, "No step is recorded yet."));
}

// Phases inside the step, what is left of it, and what runs between steps.
function timeParts(run) {
  const parts = [...PHASES, ...AROUND].filter(([, name]) => sum(run.metrics[name]) > 0)
    .map(([label, name, hue]) => ({ label, hue, values: run.metrics[name].map((value) => value ?? 0) }));
  const step = run.metrics["timing_s/step"];
  if (!step) return parts;
  const rest = step.map((whole, i) => whole == null ? 0 :
    Math.max(0, whole - sum(PHASES.map(([, name]) => run.metrics[name]?.[i]))));
  return [...parts, { label: "rest of the step", hue: 6, values: rest }];
}

function drawStacks() {
  const stacks = byId("stacks");
  runs.forEach((run) => {
    const parts = timeParts(run);
    if (parts.length) stacks.append(stackChart(run.name, "seconds", run, parts));
  });
  byId("time").hidden = !stacks.children.length;
}

function drawGroups() {
  const groups = new Map();
  for (const name of new Set(runs.flatMap((run) => Object.keys(run.metrics)))) {
    const group = name.split("/")[0];
    groups.set(group, [...(groups.get(group) || []), name]);
  }
  const wanted = byId("metric-filter").value.trim().toLowerCase();
  const shown = [...groups].sort().map(([group, names]) => {
    const found = names.filter((name) => name.toLowerCase().includes(wanted)).sort();
    if (!found.length) return null;
    const grid = make("div", { class: "grid" });
    const fill = () => { if (!grid.children.length) grid.append(...found.map((name) => lineChart(name, "", seriesOf([name])))); };
    const details = make("details", { ontoggle: () => details.open && fill() },
      make("summary", {}, `${group} (${found.length})`), grid);
    details.open = wanted !== "" && found.length <= 12;
    return details;
  });
  byId("groups").replaceChildren(...shown.filter(Boolean));
}

const FACTS = [
  ["command", (run) => run.command],
  ["model", (run) => run.config["model.hf_path"] ?? null, "null"],
  ["from checkpoint", (run) => run.config["model.checkpoint"], "null"],
  ["layers", (run) => last(run.metrics["nested/num_layers"]) ?? run.config["model.architecture.num_layers"]],
  ["skipping", skipping],
  ["algorithm", (run) => run.command !== "train" ? null :
    ["objective", "rollout_is", "advantage"].map((key) => run.config["algorithm." + key]).filter(Boolean).join(", ")],
  ["batch", (run) => run.command === "evaluate" ? null : run.command === "sft" ? run.config["sft.global_batch_size"] :
    `${run.config["rollout.prompts_per_step"] ?? "?"} prompts × ${run.config["rollout.group_size"] ?? "?"} completions`],
  ["weights of step", (run) => (run.command === "evaluate" ? last(run.steps) : null)],
  ["steps", (run) => run.command === "evaluate" ? null : `${format(last(run.steps) ?? 0)} of ${run.num_steps ?? "?"}`],
  ["wall time", (run) => run.command === "evaluate" ? null : duration((last(run.times) ?? 0) - (first(run.times) ?? 0))],
  ["time of a step, median", (run) => duration(median(run.metrics["perf/time_per_step"]))],
  ["generated tokens", (run) => format(sum(run.metrics["perf/generated_tokens"]) || null)],
  ["tokens/s generated, median", (run) => format(median(run.metrics["perf/generated_tokens_per_second"]))],
  ["reward, first → last fifth", (run) => fifths(run.metrics["critic/rewards/mean"])],
  ["KL, mean, nats per token", (run) => format(mean(run.metrics["rollout_corr/kl"]))],
  ["effective sample size, mean", (run) => format(mean(run.metrics["nested/ess"]))],
  ["skipped updates", (run) => format(last(run.metrics["training/skipped_updates"]))],
  ["reward timeouts, errors", (run) => has(run, "reward/timeouts") ?
    `${format(last(run.metrics["reward/timeouts"]))}, ${format(last(run.metrics["reward/errors"]))}` : null],
  ["processes", (run) => run.environment.world_size],
  ["machine", (run) => [run.environment.hostname, run.environment["cpu.count"] && run.environment["cpu.count"] + " CPUs",
    run.environment.devices !== "[]" ? run.environment.devices : null].filter(Boolean).join(", ")],
  ["commit", (run) => run.environment["git.commit"] &&
    run.environment["git.commit"].slice(0, 10) + (run.environment["git.changed"] === "True" ? ", changed" : "")],
  ["started last", (run) => run.environment.time],
];

function skipping(run) {
  if (run.command === "sft") return `layer dropout, at most ${run.config["sft.max_skipped"] ?? "?"}`;
  const part = run.config["nested.part"] ?? "layer", controller = run.config["controller.metric"];
  const skipped = numbers(run.metrics["nested/num_skipped"]);
  if (!skipped.length) return null;
  const low = Math.min(...skipped), high = Math.max(...skipped);
  const steered = controller && controller !== "none" ? `, steered by ${controller}` : "";
  if (high === 0) return "nothing: full depth" + steered;
  return `${low === high ? low : low + " to " + high} × ${part}, ${run.config["nested.law"] ?? "?"}${steered}`;
}

function fifths(values) {
  const known = numbers(values), size = Math.ceil(known.length / 5);
  return known.length ? `${format(mean(known.slice(0, size)))} → ${format(mean(known.slice(-size)))}` : null;
}

function table(head, rows, numeric) {
  return make("div", { class: "scroll" }, make("table", { class: "data" },
    make("thead", {}, make("tr", {}, ...head.map((cell, i) => make("th", { class: numeric && i ? "number" : null }, cell)))),
    make("tbody", {}, ...rows.map(([name, ...cells]) => make("tr", {}, make("th", { scope: "row" }, name),
      ...cells.map((cell) => make("td", { class: numeric ? "number" : null }, plainText(String(cell ?? "–")))))))));
}

function drawFacts() {
  const facts = byId("facts"), head = ["", ...runs.map((run) => plainText(run.name))];
  for (const run of runs) {
    const notes = [...run.notes];
    if (run.thinned[0] < run.thinned[1]) notes.push(`curves show ${run.thinned[0]} of ${run.thinned[1]} recorded steps`);
    if (notes.length) facts.append(make("div", { class: "notes" }, make("b", {}, plainText(run.name)),
      make("ul", {}, ...notes.map((note) => make("li", {}, plainText(note))))));
  }
  const rows = FACTS.map(([name, read]) => [name, ...runs.map((run) => read(run) ?? null)]);
  const accuracies = [...new Set(runs.flatMap((run) => Object.keys(run.metrics)))].filter(isAccuracy).sort();
  for (const name of accuracies) {
    rows.push([`${name.replace("val-core/", "")}, first → last`, ...runs.map((run) => has(run, name) ?
      `${format(first(run.metrics[name]))} → ${format(last(run.metrics[name]))}` : null)]);
  }
  const isTold = (row) => row.slice(1).some((cell) => cell != null && cell !== "" && cell !== "null" && cell !== "–");
  facts.append(table(head, rows.filter(isTold).map((row) => row.map((cell) => cell === "null" ? null : cell))));
  drawConfig(facts, head);
}

function drawConfig(parent, head) {
  const read = (key) => (run, name) => run[key][name] ?? "–";
  for (const [title, key] of [["configuration", "config"], ["versions", "versions"]]) {
    const names = [...new Set(runs.flatMap((run) => Object.keys(run[key])))];
    const rows = names.map((name) => [name, ...runs.map((run) => read(key)(run, name))]);
    const differing = rows.filter((row) => new Set(row.slice(1)).size > 1);
    if (runs.length > 1 && differing.length) {
      parent.append(make("details", { open: key === "config" && differing.length <= 20 },
        make("summary", {}, `Differences in ${title} (${differing.length})`), table(head, differing)));
    }
    if (rows.length) parent.append(make("details", {}, make("summary", {}, `All of the ${title} (${rows.length})`), table(head, rows)));
  }
}

// The map of layers by step. Where a column of pixels holds several steps, colours mix.
const STATES = [["ran", null], ["attention left out", 5], ["mlp left out", 4], ["layer skipped", 0]];

function drawHeatmaps() {
  const parent = byId("heatmaps");
  runs.forEach((run) => {
    if (run.plans && run.plans.some((plan) => plan && /[123]/.test(plan))) parent.append(heatmap(run));
    else {
      const why = run.plans ? "nothing was skipped" : "this run has not recorded its plans";
      parent.append(make("p", { class: "muted" }, `${plainText(run.name)}: ${why}.`));
    }
  });
}

function heatmap(run) {
  const places = run.plans.map((plan, i) => (plan ? i : -1)).filter((i) => i >= 0);
  const plans = places.map((i) => run.plans[i]), layers = plans[0].length;
  const used = [0, 1, 2, 3].filter((cell) => cell === 0 || plans.some((plan) => plan.includes(String(cell))));
  const swatch = (cell) => make("i", { style: cell ? `background:${colour(STATES[cell][1])}` : "background:var(--faint);border:1px solid var(--line)" });
  const legend = make("span", { class: "swatches" });
  const canvas = make("canvas", { role: "img", tabindex: 0, "aria-label": `layers skipped by step, ${run.name}` });
  const bars = make("canvas", {}), labels = drawn("svg", { width: 30 }), foot = drawn("svg", { height: 30 });
  const element = make("figure", { class: "heat" },
    make("figcaption", {}, make("b", {}, plainText(run.name)), make("span", {}, `${layers} layers, ${plans.length} steps`), legend),
    make("div", { style: "display:grid;grid-template-columns:34px minmax(0,1fr) 74px" }, labels, canvas, bars, make("span"), foot, make("span", { class: "muted", style: "font-size:11px;padding-left:6px" }, "share of steps")));
  const draw = () => {
    legend.replaceChildren(...used.map((cell) => make("span", { class: "swatch" }, swatch(cell), STATES[cell][0])));
    const width = Math.round(canvas.parentElement.clientWidth - 108), row = Math.max(4, Math.min(15, Math.floor(420 / layers)));
    if (width < 40) return;
    paintCells(canvas, plans, width, row);
    paintBars(bars, plans, row);
    labels.replaceChildren();
    labels.setAttribute("height", row * layers);
    const every = Math.ceil(13 / row);
    for (let layer = 0; layer < layers; layer += every) {
      drawn("text", { x: 28, y: layer * row + row / 2 + 4, "text-anchor": "end" }, labels).textContent = layer;
    }
    foot.replaceChildren();
    for (const k of ticks(0, plans.length - 1, Math.max(2, width / 90)).filter(Number.isInteger)) {
      drawn("text", { x: ((k + 0.5) / plans.length) * width, y: 14, "text-anchor": "middle" }, foot).textContent = run.steps[places[k]];
    }
    drawn("text", { x: width, y: 28, "text-anchor": "end" }, foot).textContent = "step";
  };
  canvas.onpointermove = (event) => {
    const box = canvas.getBoundingClientRect();
    const k = Math.min(plans.length - 1, Math.floor(((event.clientX - box.left) / box.width) * plans.length));
    const layer = Math.max(0, Math.min(layers - 1, Math.floor(((event.clientY - box.top) / box.height) * layers)));
    showTip(event, `step ${run.steps[places[k]]}, layer ${layer}`, [[null, STATES[plans[k][layer]][0], ""]]);
  };
  canvas.onpointerleave = hideTip;
  whenWidthChanges(element, draw);
  redraws.add(draw);
  return element;
}

function paintCells(canvas, plans, width, row) {
  const layers = plans[0].length, count = Math.min(plans.length, width);
  canvas.width = count; canvas.height = layers;
  canvas.style.cssText = `width:100%;height:${row * layers}px`;
  const pen = canvas.getContext("2d");
  pen.fillStyle = getComputedStyle(document.documentElement).getPropertyValue("--faint");
  pen.fillRect(0, 0, count, layers);
  for (let column = 0; column < count; column++) {
    const from = Math.floor((column * plans.length) / count), to = Math.floor(((column + 1) * plans.length) / count);
    for (let layer = 0; layer < layers; layer++) {
      const cells = [0, 0, 0, 0];
      for (let k = from; k < to; k++) cells[plans[k][layer]]++;
      let rest = to - from;
      for (const cell of [1, 2, 3]) {
        if (!cells[cell]) continue;
        // Painted over one another, each with its share of what is not painted yet.
        pen.globalAlpha = cells[cell] / rest;
        pen.fillStyle = colour(STATES[cell][1]);
        pen.fillRect(column, layer, 1, 1);
        rest = to - from;
      }
    }
  }
}

function paintBars(canvas, plans, row) {
  const layers = plans[0].length, scale = devicePixelRatio || 1;
  canvas.width = 70 * scale; canvas.height = row * layers * scale;
  canvas.style.cssText = `width:70px;height:${row * layers}px;margin-left:4px`;
  const pen = canvas.getContext("2d");
  pen.scale(scale, scale);
  for (let layer = 0; layer < layers; layer++) {
    const share = plans.filter((plan) => plan[layer] !== "0").length / plans.length;
    pen.fillStyle = colour(0);
    pen.globalAlpha = 0.7;
    pen.fillRect(0, layer * row + 1, 38 * share, row - 2);
    if (row >= 10 || layer % Math.ceil(13 / row) === 0) {
      pen.globalAlpha = 1;
      pen.font = "10px system-ui, sans-serif";
      pen.fillStyle = getComputedStyle(document.documentElement).getPropertyValue("--muted");
      pen.fillText((100 * share).toFixed(0) + " %", 42, layer * row + row / 2 + 3.5);
    }
  }
}
