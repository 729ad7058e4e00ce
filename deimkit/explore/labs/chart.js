// A plotly figure that a kernel draws anew for every move of a control, and that says what a hand does to it.

// The library is large: the first chart of a page asks the kernel for it, and all others share it.
function plotly(model) {
  globalThis.deimkitPlotly ??= new Promise((resolve, reject) => {
    model.on("msg:custom", function heard(message, buffers) {
      if (message.answer !== "plotly") return;
      model.off("msg:custom", heard);
      const parts = ["const module = { exports: {} }, define = undefined;\n", buffers[0]];
      const address = URL.createObjectURL(
        new Blob([...parts, "\nexport default module.exports;"], { type: "text/javascript" }),
      );
      import(address).then((loaded) => resolve(loaded.default), reject);
    });
    model.send({ ask: "plotly" });
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
