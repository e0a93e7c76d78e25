"use strict";
// A latent's card stands in the page as an inert <template>; a link to it opens the card beside the page.
(() => {
  const isCard = (id) => {
    const found = id ? document.getElementById(id) : null;
    return found instanceof HTMLTemplateElement ? found : null;
  };
  if (!document.querySelector("template[data-latent]")) return;
  const dialog = document.createElement("dialog");
  dialog.className = "card-panel";
  dialog.setAttribute("aria-label", "Latent");
  const close = document.createElement("button");
  close.type = "button";
  close.className = "close";
  close.textContent = "Close";
  const body = document.createElement("div");
  body.className = "card-body";
  dialog.append(close, body);
  document.body.append(dialog);
  let opener = null;

  function show(id) {
    const card = isCard(id);
    if (!card) return false;
    body.replaceChildren(card.content.cloneNode(true));
    dialog.setAttribute("aria-label", "Latent " + card.dataset.latent);
    if (card.dataset.pair) {
      const pair = document.createElement("p");
      pair.className = "legend";
      pair.textContent = "Read in " + card.dataset.pair;
      body.querySelector("header")?.append(pair);
    }
    // Only links to cards that are there stay links.
    for (const link of body.querySelectorAll("a[href^='#']")) {
      if (!isCard(link.hash.slice(1))) link.replaceWith(...link.childNodes);
    }
    if (!dialog.open) {
      opener = document.activeElement;
      dialog.showModal();
    }
    dialog.scrollTop = 0;
    close.focus();
    return true;
  }

  document.addEventListener("click", (event) => {
    const link = event.target instanceof Element && event.target.closest("a[href^='#']");
    if (!link || event.ctrlKey || event.metaKey || event.shiftKey || !isCard(link.hash.slice(1))) return;
    event.preventDefault();
    show(link.hash.slice(1));
    history.replaceState(null, "", link.hash);
  });
  close.addEventListener("click", () => dialog.close());
  // A click beside the panel falls on the dialog itself.
  dialog.addEventListener("click", (event) => { if (event.target === dialog) dialog.close(); });
  dialog.addEventListener("close", () => {
    body.replaceChildren();
    history.replaceState(null, "", "#");
    if (opener && opener.isConnected) opener.focus();
  });
  window.addEventListener("hashchange", () => { show(location.hash.slice(1)); });
  show(location.hash.slice(1));
})();
