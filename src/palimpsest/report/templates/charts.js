"use strict";
// The chart library is large: it stands in the page as text, and is read only after the page has been shown.
(() => {
  const source = document.getElementById("chart-data");
  const figures = [...document.querySelectorAll("[data-chart]")];
  if (!source || !figures.length) return;
  const idle = window.requestIdleCallback || ((act) => setTimeout(act, 1));
  let data = null;

  function library() {
    const held = document.getElementById("chart-library");
    if (window.vegaEmbed || !held) return;
    const script = document.createElement("script");
    script.textContent = held.textContent;
    document.body.append(script);
  }

  function draw(figure) {
    const target = figure.querySelector(".plot");
    const spec = data.specs[figure.dataset.chart];
    if (!spec || !window.vegaEmbed) {
      target.textContent = "This chart could not be drawn.";
      return Promise.resolve();
    }
    return window
      .vegaEmbed(target, spec, { actions: false, renderer: "svg", ast: true, config: data.config })
      .then(() => figure.classList.add("drawn"))
      .catch((error) => { target.textContent = "This chart could not be drawn: " + error.message; });
  }

  // One after the other, those on the screen first, so that scrolling and clicking never wait for more than one chart.
  const seen = new Set();
  const watch = new IntersectionObserver((entries) => {
    for (const entry of entries) (entry.isIntersecting ? seen.add(entry.target) : seen.delete(entry.target));
  }, { rootMargin: "300px" });
  figures.forEach((figure) => watch.observe(figure));
  const waiting = new Set(figures);
  function next() {
    const figure = [...seen].find((one) => waiting.has(one)) || waiting.values().next().value;
    if (!figure) return watch.disconnect();
    waiting.delete(figure);
    draw(figure).then(() => idle(next, { timeout: 200 }));
  }

  requestAnimationFrame(() => setTimeout(() => {
    data = JSON.parse(source.textContent);
    library();
    next();
  }));
})();
