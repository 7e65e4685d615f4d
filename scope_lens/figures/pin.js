// A click on a node pins it: the edges into and out of pinned nodes are shown alone, all of them, and what they do not
// touch is faint. Another click frees it; a double click on the empty figure, or the slider, frees all.
(() => {
  const figure = document.getElementById("{plot_id}");
  const pin = figure.layout.meta.pin;
  const pinned = new Set(pin.pinned);
  const nodeTraces = pin.nodes.map((_, number) => pin.firstNode + number);
  const styleTraces = Array.from({ length: pin.ring - pin.firstStyle }, (_, number) => pin.firstStyle + number);
  const bandTraces = Array.from({ length: pin.firstStyle }, (_, number) => number);

  const draw = () => {
    const lines = styleTraces.map(() => ({ x: [], y: [] }));
    const touched = new Set(pinned);
    pin.source.forEach((source, edge) => {
      const target = pin.target[edge];
      if (!pinned.has(source) && !pinned.has(target)) return;
      touched.add(source).add(target);
      const line = lines[pin.style[edge]];
      line.x.push(pin.x[source], pin.x[target], null);
      line.y.push(pin.y[source], pin.y[target], null);
    });
    const opacity = pin.nodes.map((nodes) => nodes.map((node) => (!pinned.size || touched.has(node) ? 1 : pin.faint)));
    const chosen = [...pinned];
    const slider = figure.layout.sliders && figure.layout.sliders[0];
    const shown = slider ? slider.steps[slider.active].args[0].visible : bandTraces.map(() => true);
    Plotly.restyle(figure, { visible: shown.map((visible) => visible && !pinned.size) }, bandTraces);
    Plotly.restyle(figure, { x: lines.map((line) => line.x), y: lines.map((line) => line.y) }, styleTraces);
    Plotly.restyle(
      figure,
      { x: [chosen.map((node) => pin.x[node])], y: [chosen.map((node) => pin.y[node])] },
      [pin.ring],
    );
    Plotly.restyle(figure, { "marker.opacity": opacity }, nodeTraces);
  };

  figure.on("plotly_click", (event) => {
    const nodes = pin.nodes[event.points[0].curveNumber - pin.firstNode];
    if (!nodes) return;
    const node = nodes[event.points[0].pointNumber];
    if (!pinned.delete(node)) pinned.add(node);
    draw();
  });
  const free = () => {
    if (!pinned.size) return;
    pinned.clear();
    draw();
  };
  figure.on("plotly_doubleclick", free);
  figure.on("plotly_sliderchange", free);
})();
