/* Tables that can be browsed: search, sort, choose and page through all rows of a table.

   A page holds the first rows in a box of the class `browse` (src/scfm_circuits/report_tables.py).
   When it comes near, its data file is loaded, a script that calls companionTable(name, table):
   a page opened from disk may load a script but not fetch a file. Each column has its distinct
   `values` in sorting order and, for every row, a code: an index into them, -1 if missing.

   A box may name a column to group its rows by and columns that a row shows only when it is opened.
   What is searched, chosen and sorted is kept in the page's address, if the page has one such table:
   #q=blood&verdict=match&sort=-paper.

   Texts come from strangers: they reach the page through textContent only. */
"use strict";
(window.companionParts ??= []).push(({ element, loaded, whenNear }) => {
  const TYPING_MS = 120;
  const LONG_NAME = 12;
  const received = new Map();

  window.companionTable = (name, table) => received.set(name, table);

  const counted = (number) => number.toLocaleString("en-US");
  // As on the rest of the page (companion.py), and so that either sign is found.
  const printed = (text) => text.replace(/(?<![^\s([])-(?=\d)/g, "\u2212");
  const typed = (text) => text.toLowerCase().replaceAll("\u2212", "-");

  class Column {
    constructor({ name, kind, values, codes, choose, link }) {
      Object.assign(this, { name, kind, values, choose, link });
      this.codes = Int32Array.from(codes);
      this.incomplete = this.codes.includes(-1);
    }

    text(row) {
      return this.codes[row] < 0 ? "" : this.values[this.codes[row]];
    }

    /** Mark in `found` the rows whose text contains the word. */
    find(word, found) {
      this.lower ??= this.values.map(typed);
      const hits = Uint8Array.from(this.lower, (text) => (text.includes(word) ? 1 : 0));
      if (!hits.includes(1)) return;
      for (let row = 0; row < found.length; row++) {
        const code = this.codes[row];
        if (code >= 0 && hits[code]) found[row] = 1;
      }
    }
  }

  class Browser {
    constructor(box, table) {
      this.box = box;
      this.columns = table.columns.map((column) => new Column(column));
      this.rows = table.rows;
      this.size = Number(box.dataset.rows);
      this.page = 0;
      this.chosen = new Map();
      this.sorted = null;
      const named = (name) => this.columns.find((column) => column.name === name);
      const { by, folded, filters } = JSON.parse(box.dataset.grouped ?? "{}");
      this.group = named(by);
      this.folded = (folded ?? []).map(named);
      this.filters = this.columns.filter((one) => one.choose
        && (filters === undefined || filters.includes(one.name)));
      this.seen = this.columns.filter((one) => one !== this.group && !this.folded.includes(one));
      this.order = Int32Array.from({ length: this.rows }, (_, row) => row);
      this.scroll = box.querySelector(".table-scroll");
      this.body = box.querySelector("tbody");
      this.heads = [...box.querySelectorAll("thead th")];
    }

    start() {
      this.heads.forEach((head, index) => {
        this.addSorting(head, this.columns[index]);
        head.hidden = !this.seen.includes(this.columns[index]);
      });
      if (this.group) this.box.querySelector("table").classList.add("stacks");
      if (this.folded.length) {
        this.heads[0].parentElement.append(element("th", { scope: "col", className: "opens" },
          element("span", { className: "visually-hidden" }, "Details")));
      }
      this.scroll.before(this.controls());
      this.scroll.after(this.pager());
      this.box.querySelector(".table-count")?.remove();
      this.alone = document.querySelectorAll(".browse[data-source], .circuit").length === 1;
      if (this.alone) window.addEventListener("hashchange", () => this.read());
      this.read();
      this.select();
    }

    // --- the address ---

    /** Take search, choices and order from the address if it has any of this table's. */
    read() {
      if (!this.alone) return;
      const state = new URLSearchParams(location.hash.slice(1));
      const known = ["q", "sort", ...this.choices.keys()].some((name) => state.has(name));
      if (!known) return;
      this.search.value = state.get("q") ?? "";
      for (const [name, list] of this.choices) {
        const wanted = state.get(name);
        const option = [...list.options].find((one) => one.value && one.text === wanted);
        list.value = option?.value ?? "";
        this.choose(name);
      }
      const sort = state.get("sort") ?? "";
      const column = this.columns.find(({ name }) => name === sort.replace(/^-/, ""));
      this.sorted = column ? { column, down: sort.startsWith("-") } : null;
      this.arrange();
      this.select();
      this.box.scrollIntoView();
    }

    write() {
      if (!this.alone) return;
      const state = new URLSearchParams();
      if (this.search.value) state.set("q", this.search.value);
      for (const [name, list] of this.choices) {
        if (list.value) state.set(name, list.selectedOptions[0].text);
      }
      if (this.sorted) state.set("sort", `${this.sorted.down ? "-" : ""}${this.sorted.column.name}`);
      // Another anchor of the page stays until something is chosen.
      if (String(state) || /=/.test(location.hash)) {
        history.replaceState(null, "", `${location.pathname}${location.search}${
          String(state) && "#"}${state}`);
      }
    }

    // --- what the reader handles ---

    controls() {
      this.search = element("input", {
        type: "search", autocomplete: "off", spellcheck: false,
        title: "Rows that contain every word, in any column",
      });
      let typing;
      this.search.addEventListener("input", () => {
        clearTimeout(typing);
        typing = setTimeout(() => this.select(), TYPING_MS);
      });
      const group = element("div", {
        className: "browse-controls", role: "group", "aria-label": "Search and filter",
      }, element("label", { className: "browse-search" }, "Search ", this.search));
      this.choices = new Map(this.filters
        .map((column) => [column.name, this.choice(column, group)]));
      if (this.columns.some((column) => column.kind === "long")) group.append(this.unclamping());
      const reset = element("button", { type: "button" }, "Reset");
      reset.addEventListener("click", () => this.reset());
      group.append(reset);
      return group;
    }

    /** A list to choose one of a column's values from. */
    choice(column, group) {
      const options = column.values.map((value, code) => new Option(value, String(code)));
      if (column.incomplete) options.push(new Option("(none)", "-1"));
      const list = element("select", {}, new Option("all", ""), ...options);
      list.addEventListener("change", () => {
        this.choose(column.name);
        this.select();
      });
      group.append(element("label", {}, element("span", {}, column.name), " ", list));
      return list;
    }

    choose(name) {
      const column = this.columns.find((one) => one.name === name);
      const { value } = this.choices.get(name);
      if (value === "") this.chosen.delete(column);
      else this.chosen.set(column, Number(value));
    }

    unclamping() {
      const whole = element("input", { type: "checkbox" });
      whole.addEventListener("change", () => this.box.classList.toggle("whole", whole.checked));
      return element("label", {}, whole, " whole texts");
    }

    pager() {
      const step = (text, label, by) => {
        const button = element("button", { type: "button", "aria-label": label }, text);
        button.addEventListener("click", () => {
          // Not the attribute `disabled`: it would take the focus away on the last page.
          if (button.getAttribute("aria-disabled") === "true") return;
          this.page += by;
          this.show();
        });
        return button;
      };
      this.previous = step("Previous", "Previous rows", -1);
      this.next = step("Next", "Next rows", 1);
      this.count = element("span", { role: "status", "aria-live": "polite" });
      return element("div", { className: "browse-pager" }, this.previous, this.next, this.count);
    }

    addSorting(head, column) {
      // A long name may break after an underscore and nowhere else.
      const parts = column.name.length > LONG_NAME ? column.name.split(/(?<=_)/) : [column.name];
      const button = element("button", { type: "button" },
        ...parts.flatMap((part, index) => (index ? [element("wbr"), part] : [part])));
      button.addEventListener("click", () => this.sort(column));
      head.replaceChildren(button);
    }

    reset() {
      this.search.value = "";
      for (const list of this.choices.values()) list.value = "";
      this.chosen.clear();
      this.sort(null);
    }

    // --- which rows, in which order ---

    /** Sort upwards, then downwards, then in the order of the file; missing values come last. */
    sort(column) {
      const before = this.sorted;
      const down = column !== null && before?.column === column && !before.down;
      const again = column === null || (before?.column === column && before.down);
      this.sorted = again ? null : { column, down };
      this.arrange();
      this.select();
    }

    /** Put the rows in the order that is asked for, which leaves groups together. */
    arrange() {
      const { column, down } = this.sorted ?? {};
      const groups = this.sorted && this.group ? this.group.codes : null;
      const { codes } = column ?? {};
      const sign = down ? -1 : 1;
      this.order.sort((a, b) => (groups ? groups[a] - groups[b] : 0) || (codes
        ? (codes[a] < 0 || codes[b] < 0 ? (codes[a] < 0) - (codes[b] < 0)
          : sign * (codes[a] - codes[b])) : 0) || a - b);
      this.heads.forEach((head, index) => {
        if (this.columns[index] === this.sorted?.column) {
          head.setAttribute("aria-sort", down ? "descending" : "ascending");
        } else {
          head.removeAttribute("aria-sort");
        }
      });
    }

    /** Apply search and choices, and go to the first page. */
    select() {
      const keep = new Uint8Array(this.rows).fill(1);
      for (const [{ codes }, code] of this.chosen) {
        for (let row = 0; row < this.rows; row++) if (codes[row] !== code) keep[row] = 0;
      }
      for (const word of typed(this.search.value).split(/\s+/).filter(Boolean)) {
        const found = new Uint8Array(this.rows);
        for (const column of this.columns) column.find(word, found);
        for (let row = 0; row < this.rows; row++) keep[row] &= found[row];
      }
      this.selected = this.order.filter((row) => keep[row]);
      this.page = 0;
      this.write();
      this.show();
    }

    // --- the page ---

    show() {
      const total = this.selected.length;
      const first = this.page * this.size;
      const rows = [...this.selected.subarray(first, first + this.size)];
      this.body.replaceChildren(...rows.flatMap((row, i) =>
        [...this.heading(row, rows[i - 1]), this.line(row)]));
      this.scroll.scrollTop = 0;
      this.previous.setAttribute("aria-disabled", String(first === 0));
      this.next.setAttribute("aria-disabled", String(first + this.size >= total));
      const of = total === this.rows ? counted(total)
        : `${counted(total)} found in ${counted(this.rows)}`;
      this.count.textContent = total === 0 ? `no row of ${counted(this.rows)} found`
        : `rows ${counted(first + 1)} to ${counted(first + rows.length)} of ${of}`;
    }

    /** The heading above the first row of a group, with how many of its rows are selected. */
    heading(row, before) {
      if (!this.group) return [];
      const { codes } = this.group;
      if (before !== undefined && codes[before] === codes[row]) return [];
      const n = this.selected.reduce((sum, one) => sum + (codes[one] === codes[row]), 0);
      return [element("tr", { className: "group" }, element("th", {
        scope: "rowgroup", colSpan: this.seen.length + (this.folded.length > 0),
      }, this.group.text(row) || "(none)", element("span", {}, ` ${n}`)))];
    }

    /** The cell that opens what a row has folded. */
    opening(row) {
      const button = element("button", { type: "button", "aria-expanded": "false",
        "aria-label": "Details" }, "+");
      button.addEventListener("click", () => {
        const line = button.closest("tr");
        const open = button.getAttribute("aria-expanded") === "true";
        button.setAttribute("aria-expanded", String(!open));
        button.textContent = open ? "+" : "\u2212";
        if (open) {
          line.nextSibling.remove();
          return;
        }
        const said = this.folded.map((column) => [column.name, printed(column.text(row))]);
        line.after(element("tr", { className: "unfolded" },
          element("td", { colSpan: this.seen.length + 1 }, element("dl", {}, ...said.flatMap(
            ([name, text]) => (text ? [element("dt", {}, name), element("dd", {}, text)] : []))))));
      });
      return element("td", { className: "opens" }, button);
    }

    line(row) {
      const cells = this.seen.map((column) => {
        const cell = element("td", { className: column.kind, "data-label": column.name });
        const text = column.text(row);
        const address = text && column.link ? this.address(column.link, row) : null;
        const said = printed(text);
        const shown = address ? element("a", { href: address }, said) : said;
        if (column.kind === "long" && text) {
          cell.append(element("div", { className: "clamp", title: text }, shown));
        } else {
          cell.append(shown);
        }
        return cell;
      });
      return element("tr", {}, ...cells, ...(this.folded.length ? [this.opening(row)] : []));
    }

    /** A row's address; null if a text that belongs in it is missing. */
    address(parts, row) {
      const texts = parts.map((part) => (typeof part === "string" ? part
        : encodeURIComponent(this.columns[part].text(row))));
      return texts.includes("") ? null : texts.join("");
    }
  }

  /** Load and take over one table; if that fails, its first rows and its CSV stay. */
  async function takeOver(box) {
    try {
      await loaded(box.dataset.source);
      const table = received.get(box.dataset.table);
      const names = [...box.querySelectorAll("thead th")].map((head) => head.textContent);
      if (names.length !== table.columns.length) throw new Error("another table");
      new Browser(box, table).start();
    } catch {
      box.querySelector(".table-note").append("; the other rows could not be loaded");
    }
  }

  whenNear(".browse[data-source]", takeOver, (boxes) => {
    for (const box of boxes) {
      box.addEventListener("click", (event) => {
        // A click opens a long text; one that ends a selection of text does not.
        if (event.target.closest("a") || String(getSelection())) return;
        event.target.closest(".clamp")?.classList.toggle("open");
      });
    }
  });
});
