"use strict";
(() => {
  const data = JSON.parse(document.getElementById("chart-data").textContent);

  function drawCharts() {
    for (const figure of document.querySelectorAll("[data-chart]")) {
      const spec = data.specs[figure.dataset.chart];
      const target = figure.querySelector(".plot");
      window
        .vegaEmbed(target, spec, { actions: false, renderer: "svg", ast: true, config: data.config })
        .then(() => figure.classList.add("drawn"))
        .catch((error) => { target.textContent = "This chart could not be drawn: " + error.message; });
    }
  }

  function makeTabs(group) {
    const panels = [...group.querySelectorAll(":scope > .panel")];
    if (panels.length < 2) return;
    const list = document.createElement("div");
    list.className = "tabs";
    list.setAttribute("role", "tablist");
    list.setAttribute("aria-label", group.dataset.label);
    const tabs = panels.map((panel, i) => {
      const tab = document.createElement("button");
      tab.type = "button";
      tab.textContent = panel.dataset.title;
      tab.id = panel.id + "-tab";
      tab.setAttribute("role", "tab");
      tab.setAttribute("aria-controls", panel.id);
      panel.setAttribute("role", "tabpanel");
      panel.setAttribute("aria-labelledby", tab.id);
      tab.addEventListener("click", () => choose(i));
      list.append(tab);
      return tab;
    });
    function choose(chosen) {
      panels.forEach((panel, i) => { panel.hidden = i !== chosen; });
      tabs.forEach((tab, i) => {
        tab.setAttribute("aria-selected", String(i === chosen));
        tab.tabIndex = i === chosen ? 0 : -1;
      });
    }
    list.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      if (!step) return;
      const next = (tabs.indexOf(document.activeElement) + step + tabs.length) % tabs.length;
      choose(next);
      tabs[next].focus();
      event.preventDefault();
    });
    group.classList.add("tabbed");
    group.prepend(list);
    choose(0);
  }

  // A latent is one <tbody>: its numbers and its examples move together. Missing values stay last both ways.
  function sortTable(table, head, column) {
    const descending = head.getAttribute("aria-sort") !== "descending";
    const value = (body) => {
      const text = body.rows[0].cells[column].dataset.sort;
      return text === "" || text === undefined ? null : Number(text);
    };
    const keyed = [...table.tBodies].map((body, place) => ({ body, place, key: value(body) }));
    keyed.sort((a, b) => {
      if (a.key === null || b.key === null) return (a.key === null) - (b.key === null) || a.place - b.place;
      return (descending ? b.key - a.key : a.key - b.key) || a.place - b.place;
    });
    table.append(...keyed.map((item) => item.body));
    for (const other of head.parentElement.cells) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", descending ? "descending" : "ascending");
  }

  for (const group of document.querySelectorAll(".tab-group")) makeTabs(group);
  for (const table of document.querySelectorAll("table.sortable")) {
    [...table.tHead.rows[0].cells].forEach((head, column) => {
      const button = head.querySelector("button");
      if (button) button.addEventListener("click", () => sortTable(table, head, column));
    });
  }
  document.documentElement.classList.add("scripted");
  if (window.vegaEmbed) drawCharts();
})();
