// A plotly figure that a kernel draws anew for every move of a control, and that says what a hand does to it.

const PATIENCE = 10000; // ms after which a chart that still waits for the library asks again

// The library is large, so all charts of a page share it: it comes to any of them. The first chart of a kernel has it
// "coming", another one asks; the rest wait, and ask if whoever did so is gone, with its kernel perhaps.
function plotly(model) {
  const shared = (globalThis.deimkitPlotly ??= unloaded());
  const hear = (message, buffers) => {
    if (message.answer === "plotly" && !shared.came) shared.take(buffers[0]);
  };
  const ask = () => {
    if (!shared.came) model.send({ ask: "plotly" });
  };
  model.on("msg:custom", hear);
  model.on("change:coming", ask); // it came before this chart listened
  if (!model.get("coming") && !shared.asked) {
    shared.asked = true;
    ask();
  }
  const again = setInterval(ask, PATIENCE);
  const stop = () => {
    clearInterval(again);
    model.off("msg:custom", hear);
    model.off("change:coming", ask);
  };
  return { stop, loaded: shared.loaded.finally(stop) };
}

function unloaded() {
  const shared = { came: false, asked: false };
  shared.loaded = new Promise((resolve, reject) => {
    shared.take = (source) => {
      shared.came = true;
      const parts = ["const module = { exports: {} }, define = undefined;\n", source, "\nexport default module.exports;"];
      const address = URL.createObjectURL(new Blob(parts, { type: "text/javascript" }));
      import(address).then((module) => resolve(module.default), reject);
    };
  });
  return shared;
}

async function render({ model, el, signal }) {
  const box = document.createElement("div");
  box.setAttribute("role", "img");
  el.append(box);
  const { stop, loaded } = plotly(model);
  signal?.addEventListener("abort", stop);
  const Plotly = await loaded;
  if (signal?.aborted) return;
  const draw = async () => {
    const { data, layout, config } = JSON.parse(model.get("figure"));
    box.setAttribute("aria-label", model.get("words"));
    await Plotly.react(box, data, layout, config);
  };
  await draw();
  const covered = document.createElement("style");
  covered.textContent = `.${model.get("covers")} { display: none }`;
  el.append(covered);
  box.on("plotly_click", ({ points }) =>
    model.send({ clicked: points.map(({ data, x, y }) => ({ trace: data.name, x, y })) }),
  );
  box.on("plotly_relayout", (change) => {
    if (Object.keys(change).some((name) => name.startsWith("shapes"))) model.send({ dragged: box.layout.shapes });
  });
  model.on("change:figure", draw);
  return () => {
    model.off("change:figure", draw);
    Plotly.purge(box);
  };
}

export default { render };
