// Draws the figures, whose data are in the page, and again when the theme changes.
"use strict";
const dark = matchMedia("(prefers-color-scheme: dark)");

function draw() {
  const style = getComputedStyle(document.documentElement);
  const color = (name) => style.getPropertyValue(name).trim();
  const axis = { gridcolor: color("--line"), zerolinecolor: color("--line"), automargin: true };
  const template = {
    layout: {
      font: { color: color("--dim"), family: style.fontFamily, size: 12 },
      hoverlabel: { bgcolor: color("--box"), bordercolor: color("--line"), font: { color: color("--fg") } },
      modebar: { bgcolor: "rgba(0,0,0,0)", color: color("--dim"), activecolor: color("--fg") },
      xaxis: axis,
      yaxis: axis,
    },
  };
  for (const figure of document.querySelectorAll("figure")) {
    const { data, layout } = JSON.parse(figure.querySelector("script").textContent);
    const options = {
      responsive: true,
      displaylogo: false,
      // All that there are: plotly's own would also offer to send the data to a service.
      modeBarButtons: [["toImage", "zoom2d", "pan2d", "resetScale2d"]],
    };
    Plotly.react(figure.querySelector("div"), data, { ...layout, template }, options);
  }
}

draw();
dark.addEventListener("change", draw);
