// Draw the curves first; the rollouts, which are larger, when the page is there.

let runs = [];

function drawLegend() {
  byId("legend").replaceChildren(...runs.map((run, index) => {
    const line = drawn("svg", { width: 26, height: 10, style: "width:26px" });
    drawn("line", { x1: 0, x2: 26, y1: 5, y2: 5, stroke: colour(index), "stroke-width": 2.4, "stroke-dasharray": dash(index) }, line);
    const button = make("button", { type: "button", "aria-pressed": String(!state.hidden.has(index)), title: "show or hide its curves",
      onclick: () => {
        if (!state.hidden.delete(index)) state.hidden.add(index);
        button.setAttribute("aria-pressed", String(!state.hidden.has(index)));
        redrawAll();
      } }, line, plainText(run.name));
    return button;
  }));
}

function startControls() {
  byId("controls").onsubmit = (event) => event.preventDefault();
  byId("smoothing").oninput = (event) => {
    state.smoothing = Number(event.target.value);
    byId("smoothing-value").textContent = state.smoothing ? state.smoothing.toFixed(2) : "off";
    redrawAll();
  };
  for (const radio of document.querySelectorAll("input[name=axis]")) {
    radio.onchange = () => { state.axis = radio.value; redrawAll(); };
  }
  byId("shares").onchange = (event) => { state.shares = event.target.checked; redrawAll(); };
  let timer = 0;
  byId("metric-filter").oninput = () => { clearTimeout(timer); timer = setTimeout(drawGroups, 150); };
  darkQuery.addEventListener("change", () => {
    drawLegend();
    redrawAll();
    if (view.chosen) { listRows(); showRollout(view.chosen); drawCompared(); }
  });
}

async function start() {
  const overview = await unpack("overview");
  runs = overview.runs;
  byId("made").textContent = `${runs.length === 1 ? "1 run" : runs.length + " runs"}, written ${overview.made}`;
  drawLegend();
  startControls();
  drawFacts();
  drawCurves();
  drawStacks();
  drawHeatmaps();
  drawGroups();
  document.documentElement.dataset.ready = "curves";
  // Let the browser paint before the larger part is unpacked.
  await new Promise((resolve) => setTimeout(resolve, 0));
  startBrowser((await unpack("rollouts")) || []);
  startCompare();
  // Charts draw themselves in the frame after the one that gives them their width.
  await new Promise((resolve) => requestAnimationFrame(() => requestAnimationFrame(resolve)));
  document.documentElement.dataset.ready = "all";
}

start().catch((error) => {
  byId("trouble").hidden = false;
  byId("trouble").textContent = typeof DecompressionStream === "undefined"
    ? "This browser cannot unpack the page: it takes Chrome 80, Firefox 113, Safari 16.4 or newer."
    : "The page cannot be drawn: " + error;
  console.error(error);
});
