/* Tables that can be browsed: search, sort, choose and page through all rows of a table.

   A page holds the first rows in a box of the class `browse` (src/scfm_circuits/report_tables.py).
   When it comes near, its data file is loaded, a script that calls companionTable(name, table):
   a page opened from disk may load a script but not fetch a file. Each column has its distinct
   `values` in sorting order and, for every row, a code: an index into them, -1 if missing.

   Texts come from strangers: they reach the page through textContent only. */
"use strict";
(window.companionParts ??= []).push(({ element, loaded, whenNear }) => {
  const TYPING_MS = 120;
  const LONG_NAME = 12;
  const received = new Map();

  window.companionTable = (name, table) => received.set(name, table);

  const counted = (number) => number.toLocaleString("en-US");

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
      this.lower ??= this.values.map((value) => value.toLowerCase());
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
      this.order = Int32Array.from({ length: this.rows }, (_, row) => row);
      this.scroll = box.querySelector(".table-scroll");
      this.body = box.querySelector("tbody");
      this.heads = [...box.querySelectorAll("thead th")];
    }

    start() {
      this.heads.forEach((head, index) => this.addSorting(head, this.columns[index]));
      this.scroll.before(this.controls());
      this.scroll.after(this.pager());
      this.box.querySelector(".table-count")?.remove();
      this.select();
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
      this.choices = this.columns.filter((column) => column.choose)
        .map((column) => this.choice(column, group));
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
        if (list.value === "") this.chosen.delete(column);
        else this.chosen.set(column, Number(list.value));
        this.select();
      });
      group.append(element("label", {}, element("span", {}, column.name), " ", list));
      return list;
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
      for (const list of this.choices) list.value = "";
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
      this.order.sort((a, b) => a - b);
      if (this.sorted) {
        const { codes } = column;
        const sign = down ? -1 : 1;
        this.order.sort((a, b) => (codes[a] < 0 || codes[b] < 0
          ? (codes[a] < 0) - (codes[b] < 0) : sign * (codes[a] - codes[b])) || a - b);
      }
      this.heads.forEach((head, index) => {
        if (this.columns[index] === this.sorted?.column) {
          head.setAttribute("aria-sort", down ? "descending" : "ascending");
        } else {
          head.removeAttribute("aria-sort");
        }
      });
      this.select();
    }

    /** Apply search and choices, and go to the first page. */
    select() {
      const keep = new Uint8Array(this.rows).fill(1);
      for (const [{ codes }, code] of this.chosen) {
        for (let row = 0; row < this.rows; row++) if (codes[row] !== code) keep[row] = 0;
      }
      for (const word of this.search.value.toLowerCase().split(/\s+/).filter(Boolean)) {
        const found = new Uint8Array(this.rows);
        for (const column of this.columns) column.find(word, found);
        for (let row = 0; row < this.rows; row++) keep[row] &= found[row];
      }
      this.selected = this.order.filter((row) => keep[row]);
      this.page = 0;
      this.show();
    }

    // --- the page ---

    show() {
      const total = this.selected.length;
      const first = this.page * this.size;
      const rows = [...this.selected.subarray(first, first + this.size)];
      this.body.replaceChildren(...rows.map((row) => this.line(row)));
      this.scroll.scrollTop = 0;
      this.previous.setAttribute("aria-disabled", String(first === 0));
      this.next.setAttribute("aria-disabled", String(first + this.size >= total));
      const of = total === this.rows ? counted(total)
        : `${counted(total)} found in ${counted(this.rows)}`;
      this.count.textContent = total === 0 ? `no row of ${counted(this.rows)} found`
        : `rows ${counted(first + 1)} to ${counted(first + rows.length)} of ${of}`;
    }

    line(row) {
      return element("tr", {}, ...this.columns.map((column) => {
        const cell = element("td", { className: column.kind });
        const text = column.text(row);
        const address = text && column.link ? this.address(column.link, row) : null;
        const shown = address ? element("a", { href: address }, text) : text;
        if (column.kind === "long" && text) {
          cell.append(element("div", { className: "clamp", title: text }, shown));
        } else {
          cell.append(shown);
        }
        return cell;
      }));
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
