"use strict";
// Two kinds of tables. `.sortable`: all its rows are in the page, and are moved. `.data`: its first rows are in the page,
// and all of them stand as JSON in a script element of the same name; they are read when the table is first touched.
(() => {
  const last = (a, b) => (a === null) - (b === null);

  // A latent is one <tbody>: its numbers and its examples move together. Missing values stay last both ways.
  function sortBodies(table, head, column) {
    const descending = head.getAttribute("aria-sort") !== "descending";
    const value = (body) => {
      const text = body.rows[0].cells[column].dataset.sort;
      return text === "" || text === undefined ? null : Number(text);
    };
    const keyed = [...table.tBodies].map((body, place) => ({ body, place, key: value(body) }));
    keyed.sort((a, b) => {
      if (a.key === null || b.key === null) return last(a.key, b.key) || a.place - b.place;
      return (descending ? b.key - a.key : a.key - b.key) || a.place - b.place;
    });
    table.append(...keyed.map((item) => item.body));
    for (const other of head.parentElement.cells) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", descending ? "descending" : "ascending");
  }

  for (const table of document.querySelectorAll("table.sortable")) {
    [...table.tHead.rows[0].cells].forEach((head, column) => {
      const button = head.querySelector("button");
      if (button) button.addEventListener("click", () => sortBodies(table, head, column));
    });
  }

  // Numbers as palimpsest.display.text prints them.
  function decimal(value, digits) {
    const small = value !== 0 && Math.abs(value) < 0.5 * 10 ** -digits;
    let text = small ? value.toExponential(1).replace(/e([+-])(\d)$/, "e$10$2") : value.toFixed(digits);
    if (!small && Number(text) === 0) text = text.replace(/^-/, "");
    return text.replaceAll("-", "−");
  }
  function percent(value, digits) {
    let text = (100 * value).toFixed(digits);
    if (Number(text) === 0) text = text.replace(/^-/, "");
    return text.replace("-", "−") + "%";
  }
  const count = (value) => Math.round(value).toLocaleString("en-US").replace("-", "−");
  const shown = (column, value) =>
    column.kind === "share" ? percent(value, column.digits)
      : column.kind === "count" ? count(value)
        : column.kind === "number" ? decimal(value, column.digits) : String(value);

  function element(name, className, text) {
    const made = document.createElement(name);
    if (className) made.className = className;
    if (text !== undefined) made.textContent = text;
    return made;
  }
  function line(className, x1, x2, y1, y2) {
    const made = document.createElementNS("http://www.w3.org/2000/svg", "line");
    for (const [key, value] of Object.entries({ class: className, x1, x2, y1, y2 })) made.setAttribute(key, value);
    return made;
  }
  function whisker(column, low, mid, high) {
    const at = (value) => Math.min(100, Math.max(0, Math.round(1e4 * (value - column.scale[0]) / (column.scale[1] - column.scale[0])) / 100));
    const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
    svg.setAttribute("class", "whisker");
    svg.setAttribute("viewBox", "0 0 100 14");
    svg.setAttribute("preserveAspectRatio", "none");
    svg.setAttribute("aria-hidden", "true");
    if (column.scale[0] < 0 && column.scale[1] > 0) svg.append(line("ref", at(0), at(0), 0, 14));
    svg.append(line("span", at(low), at(high), 7, 7), line("dot", at(mid), at(mid), 7, 7));
    return svg;
  }

  class DataTable {
    constructor(box) {
      this.box = box;
      this.table = box.querySelector("table");
      this.size = Number(box.dataset.shown);
      this.first = 0;
      this.wanted = "";
      this.sorted = null;
      [...this.table.tHead.rows[0].cells].forEach((head, i) => {
        const order = head.getAttribute("aria-sort");
        if (order) this.sorted = { column: i, descending: order === "descending" };
        const button = head.querySelector("button");
        if (button) button.addEventListener("click", () => this.sort(i));
      });
      this.addTools();
    }

    get data() {
      const source = document.querySelector(`script[data-rows="${this.box.dataset.table}"]`);
      const data = JSON.parse(source.textContent);
      Object.defineProperty(this, "data", { value: data });
      return data;
    }

    get total() { return Number(this.box.dataset.rows); }

    addTools() {
      const tools = this.box.querySelector(".tools");
      if (this.total > 8) {
        const label = element("label", "search");
        label.append(element("span", "", "Search"));
        this.search = element("input");
        this.search.type = "search";
        this.search.setAttribute("aria-label", "Search " + this.box.dataset.title);
        this.search.addEventListener("input", () => { this.wanted = this.search.value.trim().toLowerCase(); this.first = 0; this.draw(); });
        label.append(this.search);
        tools.append(label);
      }
      this.status = element("span", "status");
      this.status.setAttribute("role", "status");
      tools.append(this.status);
      if (this.total > this.size) {
        const back = this.button("←", "Earlier rows", () => { this.first -= this.size; this.draw(); });
        const on = this.button("→", "Further rows", () => { this.first += this.size; this.draw(); });
        this.pager = { back, on };
        tools.append(back, on);
      }
      tools.append(this.button("Download CSV", "", () => this.download()));
      this.say(this.total);
    }

    button(text, name, act) {
      const made = element("button", "", text);
      made.type = "button";
      if (name) made.setAttribute("aria-label", name);
      made.addEventListener("click", act);
      return made;
    }

    rows() {
      const { columns, rows } = this.data;
      const text = (row) => columns.map((c, i) => (row[i] === null ? "" : Array.isArray(row[i]) && c.kind === "words" ? row[i].join(" ") : c.interval ? row[i][0] : row[i])).join("\u001f").toLowerCase();
      let found = rows.map((row, place) => ({ row, place }));
      if (this.wanted) found = found.filter(({ row }) => text(row).includes(this.wanted));
      if (this.sorted) {
        const { column, descending } = this.sorted;
        const key = ({ row }) => this.key(columns[column], row[column]);
        const order = (a, b) => (typeof a === "string" || typeof b === "string" ? String(a).localeCompare(String(b)) : a - b);
        found.sort((a, b) => {
          const [left, right] = [key(a), key(b)];
          if (left === null || right === null) return last(left, right) || a.place - b.place;
          return (descending ? -order(left, right) : order(left, right)) || a.place - b.place;
        });
      }
      return found.map((item) => item.row);
    }

    key(column, value) {
      if (value === null) return null;
      if (column.kind === "words") return value.length ? value.join(" ") : null;
      return column.interval ? value[0] : value;
    }

    sort(i) {
      const number = !["text", "token", "words"].includes(this.data.columns[i].kind);
      const again = this.sorted && this.sorted.column === i;
      // Numbers begin with the largest, words with A.
      this.sorted = { column: i, descending: again ? !this.sorted.descending : number };
      this.first = 0;
      [...this.table.tHead.rows[0].cells].forEach((head, j) => {
        if (j === i) head.setAttribute("aria-sort", this.sorted.descending ? "descending" : "ascending");
        else head.removeAttribute("aria-sort");
      });
      this.draw();
    }

    draw() {
      const rows = this.rows();
      this.first = Math.max(0, Math.min(this.first, rows.length - 1 - (rows.length - 1) % this.size));
      const body = element("tbody");
      for (const row of rows.slice(this.first, this.first + this.size)) {
        const line = body.insertRow();
        this.data.columns.forEach((column, i) => line.append(this.cell(column, row[i], i === 0)));
      }
      if (!rows.length) {
        const none = body.insertRow().insertCell();
        none.colSpan = this.data.columns.length;
        none.className = "none";
        none.textContent = "No row holds this text.";
      }
      this.table.tBodies[0].replaceWith(body);
      this.say(rows.length);
    }

    cell(column, value, first) {
      const cell = element(first ? "th" : "td", column.style);
      if (first) cell.scope = "row";
      if (value === null || (column.kind === "words" && !value.length)) {
        cell.append(element("span", "missing", "–"));
      } else if (column.kind === "words") {
        value.forEach((word, i) => {
          if (i) cell.append(" ");
          cell.append(element("bdi", "token", word));
        });
      } else if (column.kind === "latent" && (this.box.dataset.cards.startsWith("/") || document.getElementById(this.box.dataset.cards + value))) {
        const link = element("a", "", String(value));
        link.href = (this.box.dataset.cards.startsWith("/") ? "" : "#") + this.box.dataset.cards + value;
        cell.append(link);
      } else if (column.interval) {
        const [mid, low, high] = value;
        const inner = element("div", "cell");
        inner.append(element("span", "value", shown(column, mid)));
        if (low !== null && high !== null) {
          inner.append(whisker(column, low, mid, high));
          inner.append(element("span", "note", `[${shown(column, low)}, ${shown(column, high)}]`.replaceAll("%,", ",")));
        }
        cell.append(inner);
      } else if (column.kind === "text" || column.kind === "token") {
        cell.append(element("bdi", column.kind === "token" ? "token" : "", value));
      } else cell.textContent = shown(column, value);
      return cell;
    }

    say(found) {
      const end = Math.min(this.first + this.size, found);
      const where = found > this.size ? `${count(this.first + 1)}–${count(end)} of ${count(found)}` : found === 1 ? "1 row" : `${count(found)} rows`;
      this.status.textContent = where;
      if (!this.pager) return;
      this.pager.back.disabled = this.first === 0;
      this.pager.on.disabled = end >= found;
    }

    // A spreadsheet takes text that begins with these signs for a formula; an apostrophe makes it text again.
    field(value) {
      if (value === null) return "";
      if (typeof value === "number") return String(value);
      let text = Array.isArray(value) ? value.join(" ") : String(value);
      if (/^[=+\-@\t\r]/.test(text)) text = "'" + text;
      return /[",\n\r]/.test(text) || text.startsWith("'") ? '"' + text.replaceAll('"', '""') + '"' : text;
    }

    download() {
      const { columns } = this.data;
      const wide = (column) => (column.interval ? [column.label, column.label + " from", column.label + " to"] : [column.label]);
      const cells = (row) => row.flatMap((value, i) => (columns[i].interval ? value ?? [null, null, null] : [value]));
      const lines = [columns.flatMap(wide), ...this.rows().map(cells)];
      const text = "\ufeff" + lines.map((one) => one.map((value) => this.field(value)).join(",")).join("\r\n") + "\r\n";
      const link = element("a");
      link.href = URL.createObjectURL(new Blob([text], { type: "text/csv" }));
      link.download = this.box.dataset.table + ".csv";
      document.body.append(link);
      link.click();
      link.remove();
      setTimeout(() => URL.revokeObjectURL(link.href), 10000);
    }
  }

  for (const box of document.querySelectorAll(".data[data-table]")) new DataTable(box);
})();
