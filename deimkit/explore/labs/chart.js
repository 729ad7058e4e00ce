// A plotly figure that a kernel draws anew for every move of a control, and that says what a hand does to it.

// The library is large, so all charts of a page share it. The first of a kernel has it "coming"; others ask for it.
function plotly(model) {
  globalThis.deimkitPlotly ??= new Promise((resolve, reject) => {
    const ask = () => model.send({ ask: "plotly" });
    model.on("msg:custom", function heard(message, buffers) {
      if (message.answer !== "plotly") return;
      model.off("msg:custom", heard);
      model.off("change:coming", ask);
      const parts = ["const module = { exports: {} }, define = undefined;\n", buffers[0]];
      const address = URL.createObjectURL(
        new Blob([...parts, "\nexport default module.exports;"], { type: "text/javascript" }),
      );
      import(address).then((loaded) => resolve(loaded.default), reject);
    });
    if (model.get("coming")) model.on("change:coming", ask); // if it came before anyone listened
    else ask();
  });
  return globalThis.deimkitPlotly;
}

async function render({ model, el }) {
  const box = document.createElement("div");
  box.setAttribute("role", "img");
  el.append(box);
  const Plotly = await plotly(model);
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
