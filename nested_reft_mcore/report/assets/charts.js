// Charts: lines over a shared axis, stacked areas, and the axes that they share.

const state = { smoothing: 0, axis: "step", shares: false, hidden: new Set() };
const redraws = new Set();
const HEIGHT = 210, LEFT = 52, RIGHT = 10, TOP = 8, BOTTOM = 34;

function ticks(low, high, wanted) {
  const span = high - low || Math.abs(high) || 1;
  const power = 10 ** Math.floor(Math.log10(span / wanted));
  const step = [1, 2, 5, 10].map((k) => k * power).find((s) => span / s <= wanted);
  const found = [];
  for (let k = Math.ceil(low / step - 1e-9); k * step <= high + span * 1e-9; k++) found.push(k * step);
  return found;
}
const tickText = (value) => format(Number(value.toPrecision(6)));

// An exponential mean, less biased at the start: the weights that are there make up one.
function smoothed(values, weight) {
  if (!weight) return values;
  let total = 0, mass = 0;
  return values.map((value) => {
    if (value == null) return null;
    total = weight * total + (1 - weight) * value;
    mass = weight * mass + (1 - weight);
    return total / mass;
  });
}

function xOf(run) {
  if (state.axis === "step") return run.steps;
  const start = run.times.find((time) => time != null);
  return run.times.map((time) => (time == null ? null : time - start));
}
const xLabel = () => (state.axis === "step" ? "step" : "wall time since the first line");
const xText = (x) => (state.axis === "step" ? "step " + format(x) : duration(x));

function range(values, pad) {
  let low = Infinity, high = -Infinity;
  for (const value of values) if (value != null) { low = Math.min(low, value); high = Math.max(high, value); }
  if (low > high) return [0, 1];
  const gap = low === high ? Math.abs(low) * 0.1 || 1 : pad * (high - low);
  // What is never negative has no negative axis.
  return [low >= 0 ? Math.max(0, low - gap) : low - gap, high + gap];
}

// All charts share the range of the runs that are shown, so that they can be read one above the other.
const xRange = () => range(runs.filter((_, index) => !state.hidden.has(index)).flatMap(xOf), 0);

// Axes of a chart `width` wide; returns where a value is drawn.
function axes(svg, width, [x0, x1], [y0, y1]) {
  const px = (x) => LEFT + ((x - x0) / (x1 - x0 || 1)) * (width - LEFT - RIGHT);
  const py = (y) => HEIGHT - BOTTOM - ((y - y0) / (y1 - y0 || 1)) * (HEIGHT - TOP - BOTTOM);
  for (const y of ticks(y0, y1, 5)) {
    drawn("line", { class: "gridline", x1: LEFT, x2: width - RIGHT, y1: py(y), y2: py(y) }, svg);
    drawn("text", { x: LEFT - 6, y: py(y) + 4, "text-anchor": "end" }, svg).textContent = tickText(y);
  }
  const base = HEIGHT - BOTTOM;
  drawn("line", { class: "axis", x1: LEFT, x2: width - RIGHT, y1: base, y2: base }, svg);
  for (const x of ticks(x0, x1, Math.max(2, width / 95))) {
    if (state.axis === "step" && x !== Math.round(x)) continue;
    drawn("line", { class: "axis", x1: px(x), x2: px(x), y1: base, y2: base + 4 }, svg);
    drawn("text", { x: px(x), y: base + 16, "text-anchor": "middle" }, svg).textContent =
      state.axis === "step" ? tickText(x) : duration(x);
  }
  drawn("text", { x: width - RIGHT, y: HEIGHT - 3, "text-anchor": "end" }, svg).textContent = xLabel();
  return { px, py };
}

// Points of a line; no more than four (first, least, largest, last) for each column of pixels.
function columns(points) {
  const kept = [];
  for (let i = 0; i < points.length;) {
    const column = Math.round(points[i][0]);
    let j = i, low = i, high = i;
    for (; j < points.length && Math.round(points[j][0]) === column; j++) {
      if (points[j][1] < points[low][1]) low = j;
      if (points[j][1] > points[high][1]) high = j;
    }
    for (const k of [...new Set([i, low, high, j - 1])].sort((a, b) => a - b)) kept.push(points[k]);
    i = j;
  }
  return kept;
}
const pathOf = (points) => columns(points).map(([x, y], i) => (i ? "L" : "M") + x.toFixed(1) + " " + y.toFixed(1)).join("");

// A figure that draws itself anew when its width or a control changes.
function figure(title, unit, extra) {
  const svg = drawn("svg", { height: HEIGHT, role: "img", tabindex: 0, "aria-label": title + (unit ? ", " + unit : "") });
  const caption = make("figcaption", {}, make("b", {}, title), unit ? make("span", {}, unit) : null, extra);
  const element = make("figure", {}, caption, svg);
  let width = 0;
  const draw = (force) => {
    const now = svg.clientWidth;
    if (!now || (now === width && !force)) return;
    width = now;
    svg.replaceChildren();
    element.draw(svg, width);
  };
  const again = () => { if (element.isConnected) draw(true); else redraws.delete(again); };
  redraws.add(again);
  whenWidthChanges(element, () => draw(false));
  return element;
}

// Draw in the next frame: what changes sizes in the observer's own turn is reported as an error.
function whenWidthChanges(element, draw) {
  let width = 0;
  new ResizeObserver(([entry]) => {
    if (entry.contentRect.width === width) return;
    width = entry.contentRect.width;
    requestAnimationFrame(draw);
  }).observe(element);
}
const redrawAll = () => { for (const redraw of [...redraws]) redraw(); };

// What the pointer, or the arrow keys, are over: calls `show(event, x)` with a value of the axis.
function follow(svg, xs, px, show) {
  const rule = drawn("line", { class: "rule", y1: TOP, y2: HEIGHT - BOTTOM, visibility: "hidden" }, svg);
  let place = xs.length - 1;
  const at = (event) => {
    rule.setAttribute("x1", px(xs[place]));
    rule.setAttribute("x2", px(xs[place]));
    rule.setAttribute("visibility", "visible");
    show(event, xs[place]);
  };
  const leave = () => { rule.setAttribute("visibility", "hidden"); hideTip(); };
  svg.onpointermove = (event) => {
    const x = event.clientX - svg.getBoundingClientRect().left;
    place = nearest(xs, (value) => Math.abs(px(value) - x));
    at(event);
  };
  svg.onpointerleave = svg.onblur = leave;
  svg.onkeydown = (event) => {
    const move = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!move) return;
    event.preventDefault();
    place = Math.max(0, Math.min(xs.length - 1, place + move));
    const box = svg.getBoundingClientRect();
    at({ clientX: box.left + px(xs[place]), clientY: box.top + TOP });
  };
}
function nearest(values, distance) {
  let best = 0;
  values.forEach((value, i) => { if (distance(value) < distance(values[best])) best = i; });
  return best;
}

// Lines. Each series: {run, index, label, values, intervals, dash}; those with few values get dots.
function lineChart(title, unit, series, extra) {
  const element = figure(title, unit, extra);
  element.draw = (svg, width) => {
    const lines = series.filter((one) => !state.hidden.has(one.index)).map((one) => {
      const x = xOf(one.run), points = [];
      const weight = one.intervals ? 0 : state.smoothing;
      const soft = smoothed(one.values, weight);
      one.values.forEach((value, i) => {
        if (value != null && x[i] != null) points.push({ x: x[i], value, soft: soft[i], bounds: one.intervals?.[i] });
      });
      return { ...one, points, weight };
    }).filter((one) => one.points.length);
    if (!lines.length) {
      drawn("text", { x: width / 2, y: HEIGHT / 2, "text-anchor": "middle" }, svg).textContent = "no values";
      return;
    }
    const all = lines.flatMap((one) => one.points);
    const ys = all.flatMap((p) => [p.weight ? p.soft : p.value, ...(p.bounds || [])]);
    const { px, py } = axes(svg, width, xRange(), range(ys, 0.06));
    for (const line of lines) drawLine(svg, line, px, py);
    const xs = [...new Set(all.map((p) => p.x))].sort((a, b) => a - b);
    follow(svg, xs, px, (event, x) => showTip(event, xText(x), lines.map((line) => {
      const point = line.points[nearest(line.points, (p) => Math.abs(p.x - x))];
      const off = point.x === x ? "" : ` at ${xText(point.x)}`;
      const bounds = point.bounds ? ` [${format(point.bounds[0])}, ${format(point.bounds[1])}]` : "";
      const raw = line.weight ? ` (${format(point.value)})` : "";
      return [colour(line.index), line.label + off, format(point.soft) + raw + bounds];
    })));
  };
  return element;
}

function drawLine(svg, line, px, py) {
  const stroke = colour(line.index);
  const style = { fill: "none", stroke, "stroke-linejoin": "round", "stroke-dasharray": line.dash };
  if (line.weight) {
    drawn("path", { ...style, d: pathOf(line.points.map((p) => [px(p.x), py(p.value)])), "stroke-width": 1, opacity: 0.22 }, svg);
  }
  drawn("path", { ...style, d: pathOf(line.points.map((p) => [px(p.x), py(p.soft)])), "stroke-width": 1.8 }, svg);
  const hasDots = line.points.length <= 40;
  for (const point of line.points) {
    const x = px(point.x);
    if (point.bounds) {
      const [low, high] = point.bounds.map(py);
      drawn("path", { d: `M${x} ${low}V${high}M${x - 3} ${low}h6M${x - 3} ${high}h6`, stroke, fill: "none", opacity: 0.75 }, svg);
    }
    if (hasDots) drawn("circle", { cx: x, cy: py(point.soft), r: 2.4, fill: stroke }, svg);
  }
}

// Stacked areas of one run: parts are [{label, hue, values}], all as long as the run's steps.
function stackChart(title, unit, run, parts) {
  const legend = make("span", { class: "swatches" });
  const element = figure(title, "", legend);
  element.draw = (svg, width) => {
    legend.replaceChildren(...parts.map((part) => make("span", { class: "swatch" },
      make("i", { style: `background:${colour(part.hue)};opacity:.8` }), part.label)));
    const x = xOf(run), rows = [];
    const soft = parts.map((part) => smoothed(part.values, state.smoothing));
    x.forEach((value, i) => {
      const sizes = soft.map((values) => values[i] ?? 0), total = sum(sizes);
      if (value == null || !total) return;
      rows.push({ x: value, total, sizes: state.shares ? sizes.map((size) => (100 * size) / total) : sizes });
    });
    if (!rows.length) return;
    const top = state.shares ? 100 : Math.max(...rows.map((row) => row.total));
    const { px, py } = axes(svg, width, range(rows.map((row) => row.x), 0), [0, top]);
    let floor = rows.map(() => 0);
    parts.forEach((part, k) => {
      const roof = rows.map((row, i) => floor[i] + row.sizes[k]);
      const up = rows.map((row, i) => [px(row.x), py(roof[i])]), down = rows.map((row, i) => [px(row.x), py(floor[i])]);
      drawn("path", { d: pathOf(up) + pathOf(down.reverse()).replace(/M/, "L") + "Z", fill: colour(part.hue), opacity: 0.8 }, svg);
      floor = roof;
    });
    drawn("text", { x: LEFT, y: HEIGHT - 3 }, svg).textContent = state.shares ? "% of the step" : unit;
    follow(svg, rows.map((row) => row.x), px, (event, at) => {
      const row = rows[nearest(rows, (one) => Math.abs(one.x - at))];
      showTip(event, `${xText(at)} · ${duration(row.total)}`, parts.map((part, k) => [colour(part.hue), part.label,
        state.shares ? row.sizes[k].toFixed(1) + " %" : duration(row.sizes[k])]).reverse());
    });
  };
  return element;
}
