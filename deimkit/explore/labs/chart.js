// A plotly figure that a kernel draws anew for every move of a control, and that says what a hand does to it.

const plotly = (globalThis.deimkitPlotly ??= Promise.withResolvers()); // library.js resolves it

async function render({ model, el, signal }) {
  const box = document.createElement("div");
  box.setAttribute("role", "img");
  el.append(box);
  await model.widget_manager.get_model(model.get("library").replace("IPY_MODEL_", "")); // some pages make it only now
  const Plotly = await plotly.promise;
  if (signal?.aborted) return;
  const draw = async () => {
    const { data, layout, config } = JSON.parse(model.get("figure"));
    box.setAttribute("aria-label", model.get("words"));
    await Plotly.react(box, data, layout, config);
  };
  model.on("change:shown", draw); // before the first, which may take a while
  await draw();
  const stop = () => {
    model.off("change:shown", draw);
    Plotly.purge(box);
  };
  if (signal?.aborted) return stop();
  const covered = document.createElement("style");
  covered.textContent = `.${model.get("covers")} { display: none }`;
  el.append(covered);
  box.on("plotly_click", ({ points }) =>
    model.send({ clicked: points.map(({ data, x, y }) => ({ trace: data.name, x, y })) }),
  );
  box.on("plotly_relayout", (change) => {
    if (Object.keys(change).some((name) => name.startsWith("shapes"))) model.send({ dragged: box.layout.shapes });
  });
  return stop;
}

export default { render };
