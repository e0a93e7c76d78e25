"use strict";
(() => {
  document.documentElement.classList.add("scripted");
  const nav = document.querySelector("nav.contents");
  if (!nav) return;
  const toggle = nav.querySelector("button.toggle");
  const links = [...nav.querySelectorAll("a[href^='#']")];

  function open(yes) {
    nav.classList.toggle("open", yes);
    toggle.setAttribute("aria-expanded", String(yes));
  }
  toggle.hidden = false;
  toggle.addEventListener("click", () => open(!nav.classList.contains("open")));
  nav.addEventListener("keydown", (event) => {
    if (event.key !== "Escape" || !nav.classList.contains("open")) return;
    open(false);
    toggle.focus();
  });
  for (const link of links) link.addEventListener("click", () => open(false));

  // The section that is being read: the last one whose top has passed the upper third of the window.
  const targets = links.map((link) => document.getElementById(link.hash.slice(1)));
  let waiting = false;
  function mark() {
    waiting = false;
    const line = window.innerHeight / 3;
    let current = -1;
    targets.forEach((target, i) => { if (target && target.getBoundingClientRect().top < line) current = i; });
    links.forEach((link, i) => {
      if (i === current) link.setAttribute("aria-current", "true");
      else link.removeAttribute("aria-current");
    });
    const place = nav.querySelector(".here");
    if (place) place.textContent = current < 0 ? "" : links[current].textContent;
  }
  document.addEventListener("scroll", () => {
    if (!waiting) requestAnimationFrame(mark);
    waiting = true;
  }, { passive: true });
  mark();
})();
