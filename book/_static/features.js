/* The index of all features (features.html): a table of which only the visible rows are in the page,
   and the panel of one feature, whose data are loaded when it is opened. The address says what is
   shown: features.html#L3.F123&q=cd14&layer=3&sort=-log10_E_f. All texts are set as text. */
"use strict";
window.companionParts = window.companionParts ?? [];
window.companionParts.push((tools) => {
  const { element, loaded, whenNear } = tools;
  const ROW = 34;
  const BEYOND = 8;
  const NAME = /^L(\d+)\.F(\d+)$/;
  const SVG = "http://www.w3.org/2000/svg";
  const parts = new Map();
  window.companionFeatures = (kind, number, value) => parts.set(`${kind} ${number}`, value);

  const number = (value) => (value === null || Number.isNaN(value) ? ""
    : String(Number(value.toPrecision(4))).replace("-", "\u2212"));
  const percent = (value) => (value === null ? "" : `${Number((100 * value).toPrecision(3))}\u00a0%`);
  const name = (layer, feature) => `L${layer}.F${feature}`;
  const link = (layer, feature) => element("a", { href: `#${name(layer, feature)}` },
    name(layer, feature));

  class Index {
    constructor(box, manifest, rows) {
      Object.assign(this, { box, manifest, rows, columns: manifest.columns });
      const layer = this.at("layer");
      this.names = rows.map((row) => name(row[layer], row[0]));
      this.places = new Map(this.names.map((one, place) => [one, place]));
      const texts = this.columns.flatMap((column, i) => (column.kind === "text" ? [i + 1] : []));
      this.haystack = rows.map((row, place) =>
        [this.names[place], ...texts.map((i) => row[i])].join("\n").toLowerCase());
      this.keys = new Map();
      this.filters = new Map();
      this.sorting = "";
      this.order = Uint32Array.from(rows.keys());
      this.open = -1;
    }

    at(column) {
      return this.columns.findIndex((one) => one.name === column) + 1;
    }

    start() {
      this.status = element("p", { className: "table-note", role: "status" });
      this.body = element("tbody", {});
      this.above = element("tr", { "aria-hidden": "true" });
      this.below = element("tr", { "aria-hidden": "true" });
      this.heads = new Map([["", this.head("", "Feature", "text")],
        ...this.columns.map((one) => [one.name, this.head(one.name, one.title, one.kind)])]);
      this.table = element("table", { className: "dataframe" },
        element("thead", {}, element("tr", {}, ...this.heads.values())),
        element("tbody", {}, this.above), this.body, element("tbody", {}, this.below));
      this.scroll = element("div", {
        className: "table-scroll", tabIndex: 0, role: "region", "aria-label": "Features",
      }, this.table);
      this.scroll.addEventListener("scroll", () => this.draw());
      this.panel = element("section", { className: "feature-panel", hidden: true,
        "aria-label": "Chosen feature" });
      this.box.replaceChildren(this.curated(), this.controls(), this.status, this.scroll, this.panel);
      window.addEventListener("hashchange", () => this.read(false));
      window.addEventListener("resize", () => this.draw());
      this.read(true);
    }

    // --- what the reader handles ---

    head(column, title, kind) {
      const button = element("button", { type: "button" }, title);
      button.addEventListener("click", () => {
        const falling = this.sorting === column || (column === "" && this.sorting === "");
        this.sort(falling ? `-${column}` : column);
        this.select();
      });
      return element("th", { scope: "col", className: kind === "number" ? "number" : kind,
        "data-column": column }, button);
    }

    /** Features to start with, each with the rule that chose it. */
    curated() {
      const all = this.manifest.curated ?? [];
      return element("section", { className: "feature-start", hidden: !all.length,
        "aria-label": "Features to start with" }, element("p", {},
        element("strong", {}, `Start with these ${all.length}`),
        ", each chosen by a rule and not by hand:"), element("ul", {},
        ...all.map(([layer, feature, title, rule]) => element("li", {},
          element("a", { href: `#${name(layer, feature)}` }, title), ` (${
            name(layer, feature)}): ${rule}`))));
    }

    controls() {
      this.search = element("input", { type: "search", autocomplete: "off", spellcheck: false,
        title: "Features that hold every word: name, token, gene, term" });
      this.search.addEventListener("input", () => this.select());
      const group = element("div", { className: "browse-controls", role: "group",
        "aria-label": "Search and filter" },
      element("label", { className: "browse-search" }, "Search ", this.search));
      for (const column of this.columns.filter((one) => one.filter)) {
        const input = column.filter === "choose"
          ? element("select", {}, new Option("all", ""), ...this.values(column)
            .map((value) => new Option(String(value), String(value))))
          : element("input", { type: "checkbox" });
        input.addEventListener("change", () => this.select());
        this.filters.set(column.name, input);
        group.append(element("label", {}, column.filter === "choose" ? `${column.title} ` : input,
          column.filter === "choose" ? input : ` ${column.title}`));
      }
      const reset = element("button", { type: "button" }, "Reset");
      reset.addEventListener("click", () => {
        this.set(new URLSearchParams());
        this.select();
      });
      group.append(reset);
      return group;
    }

    values(column) {
      const at = this.at(column.name);
      const found = [...new Set(this.rows.map((row) => row[at]))].filter((one) => one !== "");
      return found.sort((a, b) => (a < b ? -1 : 1));
    }

    /** Search, filters and order from the address. */
    set(state) {
      this.search.value = state.get("q") ?? "";
      for (const [column, input] of this.filters) {
        if (input.type === "checkbox") input.checked = state.has(column);
        else input.value = state.get(column) ?? "";
        if (input.selectedIndex === -1) input.value = "";
      }
      this.sort(state.get("sort") ?? "");
    }

    /** Follow the address; a link to a feature alone leaves search and order as they are. */
    read(first) {
      const state = new URLSearchParams(location.hash.slice(1));
      const asked = [...state.keys()].find((key) => NAME.test(key));
      if (first || [...state.keys()].some((key) => key !== asked)) this.set(state);
      // Another anchor of the page, or one that this run does not have.
      this.missing = asked && !this.places.has(asked) ? asked : "";
      this.show(asked ? this.places.get(asked) ?? -1 : -1);
      this.select(!asked && !this.mine(state));
    }

    mine(state) {
      return [...state.keys()].some((key) => ["q", "sort"].includes(key) || this.filters.has(key));
    }

    /** Put what is shown into the address, without a step in the history. */
    write() {
      const state = new URLSearchParams();
      if (this.search.value) state.set("q", this.search.value);
      for (const [column, input] of this.filters) {
        const value = input.type === "checkbox" ? (input.checked ? "1" : "") : input.value;
        if (value) state.set(column, value);
      }
      if (this.sorting) state.set("sort", this.sorting);
      const said = [this.open >= 0 ? this.names[this.open] : "", state.toString()];
      const hash = said.filter(Boolean).join("&");
      history.replaceState(null, "", hash ? `#${hash}` : location.href.split("#")[0]);
    }

    // --- search and order ---

    /** Numbers to sort a column by; the missing ones are NaN. */
    key(column) {
      if (!this.keys.has(column)) {
        const at = this.at(column);
        const values = this.rows.map((row) => row[at]);
        let ranks = null;
        if (this.columns[at - 1].kind === "text") {
          const sorted = [...new Set(values)].sort();
          ranks = new Map(sorted.map((value, rank) => [value, value === "" ? NaN : rank]));
        }
        this.keys.set(column, Float64Array.from(values, (value) =>
          (ranks ? ranks.get(value) : value === null ? NaN : Number(value))));
      }
      return this.keys.get(column);
    }

    /** By a column's name, with a minus for the largest first; unknown ones by layer and feature. */
    sort(sorting) {
      const falling = sorting.startsWith("-");
      const column = falling ? sorting.slice(1) : sorting;
      const known = column === "" ? falling : this.at(column) > 0;
      this.sorting = known ? sorting : "";
      this.order = Uint32Array.from(this.rows.keys());
      const sign = falling ? -1 : 1;
      if (known && column !== "") {
        const key = this.key(column);
        this.order.sort((a, b) => (Number.isNaN(key[a]) - Number.isNaN(key[b]))
          || sign * (key[a] - key[b]) || a - b);
      } else if (known) this.order.reverse();
      for (const [one, head] of this.heads) {
        head.removeAttribute("aria-sort");
        if (one === (known ? column : "")) {
          head.setAttribute("aria-sort", known && falling ? "descending" : "ascending");
        }
      }
    }

    select(silent = false) {
      const words = this.search.value.toLowerCase().split(/\s+/).filter(Boolean);
      const tests = [...this.filters].flatMap(([column, input]) => {
        const at = this.at(column);
        if (input.type === "checkbox") return input.checked ? [(row) => row[at] > 0] : [];
        return input.value === "" ? [] : [(row) => String(row[at]) === input.value];
      });
      this.shown = this.order.filter((place) =>
        words.every((word) => this.haystack[place].includes(word))
        && tests.every((test) => test(this.rows[place])));
      const all = this.rows.length.toLocaleString("en");
      this.status.textContent = `${this.shown.length.toLocaleString("en")} of ${all} features`
        + (this.missing ? `; this run has no live feature ${this.missing}` : "");
      this.table.setAttribute("aria-rowcount", String(this.shown.length + 1));
      this.scroll.scrollTop = 0;
      this.draw();
      if (!silent) this.write();
    }

    /** The rows in sight and a few around them. */
    draw() {
      const height = this.scroll.clientHeight || 600;
      const first = Math.max(0, Math.floor(this.scroll.scrollTop / ROW) - BEYOND);
      const last = Math.min(this.shown.length, first + Math.ceil(height / ROW) + 2 * BEYOND);
      // A row that has the keyboard's focus must not lose it to scrolling.
      const focused = this.body.contains(document.activeElement)
        ? document.activeElement.textContent : "";
      this.above.style.height = `${first * ROW}px`;
      this.below.style.height = `${(this.shown.length - last) * ROW}px`;
      this.body.replaceChildren(...Array.from(this.shown.subarray(first, last), (place, i) =>
        this.row(place, first + i)));
      if (focused) {
        [...this.body.querySelectorAll("a")].find((one) => one.textContent === focused)
          ?.focus({ preventScroll: true });
      }
    }

    row(place, index) {
      const values = this.rows[place];
      const cells = this.columns.map((column, i) => {
        const value = values[i + 1];
        const text = column.kind === "number" ? number(value)
          : column.kind === "flag" ? (value === null ? "" : value ? "yes" : "no") : value;
        return element("td", { className: column.kind, title: column.kind === "text" ? text : "" },
          text);
      });
      return element("tr", { "aria-rowindex": String(index + 2),
        className: place === this.open ? "chosen" : "" },
      element("th", { scope: "row" }, link(values[this.at("layer")], values[0])), ...cells);
    }

    // --- one feature ---

    async show(place) {
      if (place === this.open) return;
      this.open = place;
      this.panel.hidden = place < 0;
      this.panel.replaceChildren();
      if (place < 0) return;
      const title = element("h2", { tabIndex: -1 },
        `Feature ${this.rows[place][0]}, layer ${this.rows[place][this.at("layer")]}`);
      const closing = element("button", { type: "button" }, "Close");
      closing.addEventListener("click", () => {
        this.show(-1);
        this.select();
        this.search.focus();
      });
      const status = element("p", { role: "status" }, "Loading …");
      this.panel.replaceChildren(title, closing, status);
      let part = 0;
      let start = 0;
      while (start + this.manifest.panels[part][1] <= place) start += this.manifest.panels[part++][1];
      try {
        await loaded(this.box.dataset.source + this.manifest.panels[part][0]);
        if (this.open !== place) return;
        status.replaceWith(...this.sections(place, parts.get(`panels ${part}`)[place - start]));
      } catch {
        status.textContent = "The data of this feature could not be loaded.";
      }
      this.panel.scrollIntoView({ block: "start" });
      title.focus({ preventScroll: true });
    }

    sections(place, panel) {
      const value = (column) => this.rows[place][this.at(column)];
      const facts = [["log10 E(f)", number(value("log10_E_f"))],
        ["active on", `${panel.fired.toLocaleString("en")} tokens`],
        ["mean activation", number(panel.mean)],
        ...this.columns.filter((one) => one.kind === "flag" || one.name.startsWith("q_"))
          .map((one) => [one.title, one.kind !== "flag" ? number(value(one.name))
            : value(one.name) === null ? "" : value(one.name) ? "yes" : "no"]),
        ["score says", panel.scores.verdict ?? ""],
      ];
      return [
        this.label(panel.scores.levels ?? []),
        element("dl", {}, ...facts.filter(([, text]) => text).flatMap(([term, text]) =>
          [element("dt", {}, term), element("dd", {}, text)])),
        this.part("Strongest contexts", panel.contexts.length && element("ol",
          { className: "feature-contexts" }, ...panel.contexts.map(
            ([activation, cell, label, before, token, after]) => element("li", {},
              element("span", { className: "feature-note" },
                `${number(activation)} · ${cell} · ${label}`),
              element("br"), before, element("mark", {}, token), after)))),
        this.part("Contexts of several strengths", panel.samples?.length
          && tools.heat(panel.samples), "The firing nearest to the middle of each third of its "
          + "activations, in the cells looked at; every token is tinted by its activation."),
        this.part("Active, by cell type", panel.types?.length && tools.bars(panel.types),
          this.manifest.types_note),
        this.part("Activations", this.histogram(panel.histogram), "Tokens by the size of the "
          + "activation; each bar is half an octave wide."),
        this.part("Tokens", this.list(["token", "active", "share", "rate", "in genes"],
          panel.tokens, [String, number, percent, percent, String]),
        "Share: of the feature's activations. Rate: of the token's occurrences."),
        this.part("Genes", this.list(["gene", "active", "share"], panel.genes.map(
          ([gene, ...rest]) => [gene === "" ? "" : element("a", { rel: "noreferrer", href:
            `https://www.genecards.org/cgi-bin/carddisp.pl?gene=${encodeURIComponent(gene)}` },
          gene), ...rest]), [(one) => one, number, percent]), "Activations inside the gene's own name."),
        this.part("Terms", this.list(["library", "term", "genes", "p", "FDR", "which"],
          panel.terms, [String, String, String, number, number, String]),
        "The three of smallest p in each library, under the rule corpus."),
        this.part("Descriptions and how well they predict", this.list(["level", "items", "F1"],
          panel.scores.levels ?? [], [String, String, number])),
        this.part("Nearest features", this.list(["feature", "cosine"],
          panel.nearest.map(([layer, feature, cosine]) => [link(layer, feature), cosine]),
          [(one) => one, number]), "Cosine of the decoder rows, over all layers."),
        this.part("Logits it raises", this.list(["token", "effect"], panel.raises,
          [String, number]), "One unit of the feature through the final norm's gain and the "
          + "unembedding, against the vocabulary's mean; without the norm's division and without "
          + "later layers."),
        this.part("Logits it lowers", this.list(["token", "effect"], panel.lowers,
          [String, number])),
        this.part("Circuits", panel.circuits.length && element("ul", {}, ...panel.circuits.map(
          ([page, text]) => element("li", {}, /^[\w-]+\.html$/.test(page)
            ? element("a", { href: page }, text) : text)))),
      ].filter(Boolean);
    }

    /** The description that predicts best where it fires, with its score. */
    label(levels) {
      const best = levels.reduce((one, other) => ((other[2] ?? 0) > (one?.[2] ?? 0) ? other : one),
        null);
      return best && element("p", { className: "feature-label" }, "Best description: ",
        element("strong", {}, best[1]), ` (as ${best[0] === "token" ? "sub-words"
          : best[0] === "family" ? "gene families" : "genes"}; F1 ${number(best[2])} on held-out `
        + "cells)");
    }

    part(title, content, note = "") {
      return content && element("div", { className: "feature-part" }, element("h3", {}, title),
        content, note && element("p", { className: "feature-note" }, note));
    }

    list(heads, rows, shown) {
      if (!rows.length) return null;
      const kind = (i) => (shown[i] === number || shown[i] === percent ? "number" : "");
      return element("div", { className: "table-scroll" }, element("table",
        { className: "dataframe" }, element("thead", {}, element("tr", {}, ...heads.map((head, i) =>
          element("th", { scope: "col", className: kind(i) }, head)))),
        element("tbody", {}, ...rows.map((row) => element("tr", {}, ...row.map((value, i) =>
          element("td", { className: kind(i) }, shown[i](value))))))));
    }

    /** Bars from the first to the last bin that is not empty. */
    histogram(counts) {
      const used = counts.flatMap((count, i) => (count ? [i] : []));
      if (!used.length) return null;
      const [first, last, most] = [used[0], used.at(-1), Math.max(...counts)];
      const made = (tag, attributes, text = "") => {
        const one = document.createElementNS(SVG, tag);
        for (const [key, value] of Object.entries(attributes)) one.setAttribute(key, value);
        one.textContent = text;
        return one;
      };
      const width = 300 / (last - first + 1);
      const bars = [];
      for (let i = first; i <= last; i++) {
        const height = 80 * counts[i] / most;
        const bar = made("rect", { x: (i - first) * width, y: 80 - height,
          width: Math.max(1, width - 1), height });
        bar.append(made("title", {}, `${number(this.manifest.edges[i])} to `
          + `${number(this.manifest.edges[i + 1])}: ${counts[i].toLocaleString("en")} tokens`));
        bars.push(bar);
      }
      const ends = [number(this.manifest.edges[first]), number(this.manifest.edges[last + 1])];
      const picture = made("svg", { viewBox: "0 0 300 100", role: "img", class: "feature-histogram",
        "aria-label": `Activations from ${ends[0]} to ${ends[1]}, at most `
          + `${most.toLocaleString("en")} tokens in a bin` });
      picture.append(...bars, made("text", { x: 0, y: 96 }, ends[0]),
        made("text", { x: 300, y: 96, "text-anchor": "end" }, ends[1]));
      return picture;
    }
  }

  whenNear("#feature-index[data-source]", async (box) => {
    const { source, version } = box.dataset;
    try {
      await loaded(`${source}manifest.js?v=${version}`);
      const manifest = parts.get("manifest 0");
      await Promise.all(manifest.index.map(([part]) => loaded(source + part)));
      const rows = manifest.index.flatMap((_, i) => parts.get(`index ${i}`));
      if (rows.length !== manifest.rows) throw new Error("parts of another run");
      new Index(box, manifest, rows).start();
    } catch (error) {
      console.error(error);
      box.append("The index could not be loaded.");
    }
  });
});
