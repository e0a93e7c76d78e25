"use strict";
// Searches while one types, pages that draw themselves again, and the small tools of the forms. All of it is an addition:
// without scripts the forms are sent and the links are followed.
(() => {
  const FRAGMENT = { headers: { "X-Fragment": "1" }, credentials: "same-origin" };

  async function part(address, signal) {
    const answer = await fetch(address, { ...FRAGMENT, signal });
    return { ok: answer.ok, status: answer.status, html: await answer.text() };
  }

  // The app's own HTML, set so that no script in it would run.
  function put(target, html) {
    const kept = document.activeElement && target.contains(document.activeElement) ? document.activeElement.id : "";
    const made = document.createElement("template");
    made.innerHTML = html;
    target.replaceChildren(made.content);
    if (kept && document.getElementById(kept)) document.getElementById(kept).focus();
  }

  // --- search ---------------------------------------------------------------------------------------------------------
  function addressOf(form) {
    const fields = new URLSearchParams();
    for (const [key, value] of new FormData(form)) if (String(value).trim()) fields.append(key, value);
    const query = fields.toString();
    return form.getAttribute("action") + (query ? "?" + query : "");
  }

  for (const form of document.querySelectorAll("form[data-instant]")) {
    const target = document.querySelector(form.dataset.instant);
    let timer = 0;
    let running = null;
    async function show(address, remember) {
      if (running) running.abort();
      running = new AbortController();
      const mine = running;
      target.classList.add("searching");
      try {
        const found = await part(address, mine.signal);
        put(target, found.html);
        if (remember) history.replaceState(null, "", address);
      } catch (error) {
        if (error.name === "AbortError") return;
        put(target, "");
        target.textContent = "The app does not answer. Is palimpsest serve still running?";
      }
      if (mine === running) target.classList.remove("searching");
    }
    const soon = (wait) => { clearTimeout(timer); timer = setTimeout(() => show(addressOf(form), true), wait); };
    form.addEventListener("input", (event) => soon(event.target instanceof HTMLSelectElement ? 0 : 120));
    form.addEventListener("submit", (event) => { event.preventDefault(); soon(0); });
    target.addEventListener("click", (event) => {
      const link = event.target instanceof Element && event.target.closest("a[data-in-place]");
      if (!link || event.ctrlKey || event.metaKey || event.shiftKey) return;
      event.preventDefault();
      const address = link.getAttribute("href");
      const fields = new URL(link.href).searchParams;
      for (const name of ["sort", "order"]) if (form.elements[name] && fields.get(name)) form.elements[name].value = fields.get(name);
      show(address, true).then(() => {
        if (link.rel) target.scrollIntoView({ block: "start" });
        // The link is gone; the same one of the new page takes the focus.
        const heads = [...target.querySelectorAll("a[data-in-place]")];
        const same = heads.find((one) => one.textContent === link.textContent) || heads[0];
        if (same) same.focus({ preventScroll: true });
      });
    });
    // From the field into the list and back by arrow keys.
    form.addEventListener("keydown", (event) => {
      if (event.key !== "ArrowDown" || !(event.target instanceof HTMLInputElement) || event.target.type !== "search") return;
      const first = target.querySelector("tbody a");
      if (first) { first.focus(); event.preventDefault(); }
    });
    target.addEventListener("keydown", (event) => {
      const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
      const links = [...target.querySelectorAll("tbody th a")];
      const place = links.indexOf(document.activeElement);
      if (!step || place < 0) return;
      event.preventDefault();
      if (place + step < 0) form.querySelector("input[type=search]").focus();
      else if (links[place + step]) links[place + step].focus();
    });
  }
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || event.target.matches("input, textarea, select, [role=region]")) return;
    if (event.key === "/") {
      const field = document.querySelector("input[type=search]");
      if (field) { field.focus(); event.preventDefault(); }
    }
    const turn = { ArrowLeft: "prev", ArrowRight: "next" }[event.key];
    const link = turn && document.querySelector(`.turn a[rel=${turn}]`);
    if (link) link.click();
  });

  // --- what changes by itself -----------------------------------------------------------------------------------------
  for (const box of document.querySelectorAll("[data-poll]")) {
    const every = Number(box.dataset.every);
    let failed = 0;
    async function again() {
      // A page that nobody sees need not be drawn.
      if (document.hidden) return setTimeout(again, every);
      try {
        const found = await part(box.dataset.poll);
        failed = 0;
        const chosen = getSelection();
        const reading = chosen && !chosen.isCollapsed && box.contains(chosen.anchorNode);
        if (!reading) put(box, found.html);
        if (!found.ok || (!reading && box.querySelector("[data-over]"))) {
          box.dispatchEvent(new CustomEvent("over", { bubbles: true }));
          return undefined;
        }
      } catch {
        failed += 1;
        if (failed === 3) put(box, '<p class="job failed" role="status">The app does not answer. Is palimpsest serve still running?</p>');
      }
      return setTimeout(again, every * Math.min(1 + failed, 10));
    }
    setTimeout(again, every);
  }
  const cancel = document.getElementById("cancel");
  if (cancel) {
    cancel.addEventListener("submit", (event) => {
      event.preventDefault();
      fetch(cancel.action, { method: "POST", headers: { "Content-Type": "application/x-www-form-urlencoded" }, body: "", redirect: "manual" });
    });
  }

  // --- own text -------------------------------------------------------------------------------------------------------
  function choose(link) {
    const list = document.getElementById(link.hash.slice(1));
    if (!list) return;
    for (const other of document.querySelectorAll(".token-list.chosen, .window a.chosen")) other.classList.remove("chosen");
    list.classList.add("chosen");
    link.classList.add("chosen");
    // On a narrow screen the list stands over the end of the text.
    const over = list.parentElement.getBoundingClientRect();
    const token = link.getBoundingClientRect();
    if (token.bottom > over.top && token.right > over.left && token.top < over.bottom) link.scrollIntoView({ block: "start" });
  }
  document.addEventListener("click", (event) => {
    const link = event.target instanceof Element && event.target.closest(".own-text .window a");
    if (!link) return;
    event.preventDefault();
    choose(link);
  });
  document.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!step || !(event.target instanceof Element) || !event.target.matches(".own-text .window a")) return;
    const links = [...document.querySelectorAll(".own-text .window a")];
    const next = links[links.indexOf(event.target) + step];
    if (next) { next.focus(); choose(next); event.preventDefault(); }
  });

  // --- steering -------------------------------------------------------------------------------------------------------
  const ENDS = { scale: [0, 10], add: [-20, 20], clamp: [0, 20], ablate: [0, 1] };
  const changes = document.querySelector(".changes");
  function settle(row, moved) {
    const [mode, value, slider] = ["[name=mode]", "[name=value]", ".slider"].map((one) => row.querySelector(one));
    if (moved) [slider.min, slider.max] = ENDS[mode.value];
    slider.hidden = mode.value === "ablate";
    value.disabled = mode.value === "ablate";
    if (value.disabled) {
      // A disabled field is not sent, and the rows of the form must stay in step.
      if (!row.querySelector("input[type=hidden]")) {
        const stand = document.createElement("input");
        stand.type = "hidden";
        stand.name = "value";
        row.append(stand);
      }
    } else row.querySelectorAll("input[type=hidden]").forEach((one) => one.remove());
  }
  if (changes) {
    changes.addEventListener("input", (event) => {
      const row = event.target.closest(".change");
      const value = row.querySelector("[name=value]");
      const slider = row.querySelector(".slider");
      if (event.target === slider) value.value = String(Math.round(Number(slider.value) * 100) / 100);
      if (event.target === value && value.value.trim() !== "" && Number.isFinite(Number(value.value))) {
        const number = Number(value.value);
        slider.max = String(Math.max(Number(slider.max), number));
        slider.min = String(Math.min(Number(slider.min), number));
        slider.value = value.value;
      }
      if (event.target.name === "mode") settle(row, true);
      if (event.target.name === "latent") { const said = row.querySelector(".said"); if (said) said.remove(); }
    });
    for (const row of changes.querySelectorAll(".change")) settle(row, false);
    const add = document.querySelector("[data-add-change]");
    add.addEventListener("click", () => {
      const rows = changes.querySelectorAll(".change");
      if (rows.length >= Number(changes.dataset.most)) return;
      const row = rows[rows.length - 1].cloneNode(true);
      const said = row.querySelector(".said");
      if (said) said.remove();
      row.querySelector("legend").textContent = "Latent " + (rows.length + 1);
      row.querySelector("[name=latent]").value = "";
      row.querySelector("[name=mode]").value = "scale";
      row.querySelector("[name=value]").value = "4";
      changes.append(row);
      settle(row, true);
      row.querySelector(".slider").value = "4";
      row.querySelector("[name=latent]").focus();
      add.disabled = rows.length + 1 >= Number(changes.dataset.most);
    });
  }
  for (const button of document.querySelectorAll("[data-copy]")) {
    button.addEventListener("click", async () => {
      await navigator.clipboard.writeText(document.querySelector(button.dataset.copy).textContent);
      const before = button.textContent;
      button.textContent = "Copied";
      setTimeout(() => { button.textContent = before; }, 1500);
    });
  }
})();
