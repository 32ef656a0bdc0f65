"use strict";
// Sorting: each point is a <tbody> (its row and its details), and moves as one.
const table = document.getElementById("points");
const headings = [...table.tHead.rows[0].cells];

function sortBy(index) {
  const heading = headings[index];
  const direction = heading.getAttribute("aria-sort") === "ascending" ? -1 : 1;
  headings.forEach((other) => other.setAttribute("aria-sort", "none"));
  heading.setAttribute("aria-sort", direction === 1 ? "ascending" : "descending");
  const value = (body) => body.rows[0].cells[index].dataset.value;
  const compare = (a, b) => {
    const [x, y] = [value(a), value(b)];
    // What was not measured stays at the end, whichever way round.
    if (x === "" || y === "") return (x === "") - (y === "");
    return direction * (index === 0 ? x.localeCompare(y) : Number(x) - Number(y));
  };
  table.append(...[...table.tBodies].sort(compare));
}

headings.forEach((heading, index) =>
  heading.querySelector("button").addEventListener("click", () => sortBy(index)));

// While a study runs, the page is read again, unless somebody is reading a point's details.
if (document.querySelector("main").hasAttribute("data-renews")) {
  setInterval(() => {
    if (!document.hidden && !document.querySelector(".details:not([hidden])")) location.reload();
  }, 10000);
}

table.querySelectorAll(".more").forEach((button) => button.addEventListener("click", () => {
  const details = button.closest("tbody").rows[1];
  details.hidden = !details.hidden;
  button.setAttribute("aria-expanded", String(!details.hidden));
}));

// Plots take the colours of the page; on narrow ones names would cover the points.
const dark = matchMedia("(prefers-color-scheme: dark)");
function colour() {
  const ink = getComputedStyle(document.body).color;
  const axis = (name) => ({ [`${name}.linecolor`]: ink, [`${name}.tickcolor`]: ink });
  const narrow = innerWidth < 700 ? { annotations: [] } : {};
  document.querySelectorAll(".js-plotly-plot").forEach((plot) =>
    Plotly.relayout(plot, { ...narrow, "font.color": ink, ...axis("xaxis"), ...axis("yaxis") }));
}
dark.addEventListener("change", colour);
colour();

// Plots are drawn for the window's width; paper is narrower.
const drawn = [...document.querySelectorAll(".js-plotly-plot")];
addEventListener("beforeprint", () => drawn.forEach((plot) => Plotly.relayout(plot, { width: 980 })));
addEventListener("afterprint", () => drawn.forEach((plot) => Plotly.relayout(plot, { width: null, autosize: true })));
