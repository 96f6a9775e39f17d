"use strict";
(() => {
  const figures = JSON.parse(document.getElementById("figures").textContent);
  const root = document.documentElement;
  const chosen = {};
  const axis = () => document.querySelector("input[name=axis]:checked").value;
  const colour = (name) => getComputedStyle(root).getPropertyValue(name).trim();

  // "xaxis.title.text" reaches into the layout, as in Plotly.relayout.
  const put = (target, entries) => {
    for (const [path, value] of Object.entries(entries)) {
      const keys = path.split(".");
      const last = keys.pop();
      let at = target;
      for (const key of keys) at = at[key] = { ...(typeof at[key] === "object" ? at[key] : {}) };
      at[last] = value;
    }
  };

  const draw = (slug) => {
    const figure = figures[slug];
    const y = chosen[slug] ?? Object.keys(figure.y)[0];
    const x = axis() in figure.x ? axis() : "";
    const views = [figure.y[y], figure.x[x]].filter(Boolean);
    const traces = figure.traces.map((trace, i) => structuredClone(Object.assign({}, trace, ...views.map((view) => view.traces[i] ?? {}))));
    const layout = structuredClone(figure.layout);
    for (const view of views) put(layout, structuredClone(view.layout));
    for (const name of ["xaxis", "yaxis"]) {
      layout[name] = { linecolor: colour("--line"), gridcolor: colour("--grid"), ...layout[name] };
    }
    const font = { color: colour("--text"), family: getComputedStyle(document.body).fontFamily, size: 13 };
    const label = { bgcolor: colour("--card"), bordercolor: colour("--line"), font: { color: colour("--text") }, namelength: -1 };
    Object.assign(layout, { font, hoverlabel: label, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", autosize: true });
    const title = figure.titles[`${y} ${x}`];
    document.getElementById(`${slug}-title`).textContent = title;
    const chart = document.getElementById(slug);
    chart.setAttribute("aria-label", `Chart: ${title}. ${chart.nextElementSibling.textContent}`);
    return Plotly.react(chart, traces, layout, { responsive: true, displaylogo: false, displayModeBar: false });
  };

  // One after the other, so that the page can be read meanwhile; a later request replaces what is left of an earlier one.
  let request = 0;
  const drawAll = async (slugs) => {
    const own = ++request;
    delete root.dataset.drawn;
    for (const slug of slugs) {
      await new Promise((done) => setTimeout(done));
      if (own !== request) return;
      await draw(slug);
    }
    root.dataset.drawn = slugs.length;
  };
  const all = () => drawAll(Object.keys(figures));

  document.getElementById("axis").addEventListener("change", all);
  for (const select of document.querySelectorAll("select[data-figure]")) {
    select.addEventListener("change", () => {
      chosen[select.dataset.figure] = select.value;
      draw(select.dataset.figure);
    });
  }
  document.getElementById("theme").addEventListener("change", (event) => {
    if (event.target.value) root.dataset.theme = event.target.value;
    else delete root.dataset.theme;
    all();
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", all);
  all();
})();
