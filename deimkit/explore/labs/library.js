// The library that draws charts: it is large, so all charts of a page share the first that any kernel sends.

const plotly = (globalThis.deimkitPlotly ??= Promise.withResolvers());

function take(source) {
  plotly.came = true;
  const parts = ["const module = { exports: {} }, define = undefined;\n", source, "\nexport default module.exports;"];
  const address = URL.createObjectURL(new Blob(parts, { type: "text/javascript" }));
  import(address).then((module) => plotly.resolve(module.default), plotly.reject).finally(() => URL.revokeObjectURL(address));
}

function initialize({ model }) {
  const ask = () => plotly.came || model.send("plotly");
  model.on("msg:custom", (_, buffers) => plotly.came || take(buffers[0]));
  model.on("change:coming", ask); // it came before this page listened
  if (!model.get("coming")) ask();
}

export default { initialize };
