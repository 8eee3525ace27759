/* The rating page (rate.html): a card at a time, answers by key or button; an answer leads to the
   next card, and after the last one the answers can be saved or mailed as the CSV file that goes
   into data/human_eval/. They are kept in the browser under the study's name. All texts are set as
   text. */
"use strict";
window.companionParts = window.companionParts ?? [];
window.companionParts.push((tools) => {
  const { element } = tools;
  const COLUMNS = ["study", "card", "rater", "interpretable", "label", "note"];
  const ANSWERS = new Map([["y", "Yes"], ["n", "No"], ["u", "Unsure"]]);
  // A spreadsheet would take a cell that begins so for a formula.
  const FORMULA = /^[=+\-@\t\r]/;

  const quoted = (text) => (/[",;\r\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text);
  const safe = (text) => quoted(FORMULA.test(text) ? `'${text}` : text);
  const number = (value) => String(Number(value.toPrecision(3))).replace("-", "\u2212");
  const share = (part, whole) => `${Math.round((100 * part) / Math.max(whole, 1))}\u00a0%`;

  /** Rows of a CSV text (RFC 4180; commas, or semicolons as some spreadsheets write). */
  function parsed(text) {
    const clean = text.replace(/^\uFEFF/, "");
    const head = clean.split("\n", 1)[0];
    const comma = head.split(";").length > head.split(",").length ? ";" : ",";
    const rows = [[]];
    let cell = "";
    let inside = false;
    for (let i = 0; i < clean.length; i++) {
      const one = clean[i];
      if (inside) {
        if (one !== '"') cell += one;
        else if (clean[i + 1] === '"') cell += clean[++i];
        else inside = false;
      } else if (one === '"') inside = true;
      else if (one === comma || one === "\n") {
        rows.at(-1).push(cell.replace(/\r$/, ""));
        cell = "";
        if (one === "\n") rows.push([]);
      } else cell += one;
    }
    if (inside) throw new Error("a quote in it is never closed");
    if (cell || rows.at(-1).length) rows.at(-1).push(cell);
    const [columns, ...rest] = rows.filter((row) => row.some((value) => value.trim()));
    if (!columns) throw new Error("it is empty");
    const names = columns.map((name) => name.trim());
    const missing = COLUMNS.slice(0, 4).filter((name) => !names.includes(name));
    if (missing.length) throw new Error(`it lacks the columns ${missing.join(", ")}`);
    return rest.map((row) => Object.fromEntries(names.map((name, i) => [name, row[i] ?? ""])));
  }

  class Rating {
    constructor(box, deck) {
      Object.assign(this, { box, deck, cards: deck.cards, place: 0, rater: "", answers: {} });
      this.key = `scfm-rating:${deck.study}`;
    }

    start() {
      this.kept = this.load();
      const first = this.cards.findIndex((card) => !this.answer(card).interpretable);
      this.place = Math.max(first, 0);
      this.status = element("p", { className: "rating-status", role: "status" });
      this.progress = element("progress", { max: this.cards.length, "aria-label": "Answered" });
      this.count = element("p", { className: "rating-count" }, this.progress,
        this.counted = element("span", {}));
      this.strip = element("ol", { className: "rating-strip" });
      this.card = element("article", { className: "rating-card", tabIndex: -1 });
      this.box.replaceChildren(this.count, this.card, this.form(),
        element("div", { className: "rating-words" },
          element("label", {}, "What it fires on ", this.label),
          element("label", {}, "Note ", this.note)), this.guide(), this.top(), this.strip);
      document.addEventListener("keydown", (event) => this.pressed(event));
      this.draw();
      if (!this.kept) {
        this.say("This browser keeps nothing for this page: save your answers before you close it.");
      }
    }

    answer(card) {
      return this.answers[card.card] ?? { interpretable: "", label: "", note: "" };
    }

    // --- what is kept ---

    load() {
      try {
        const found = JSON.parse(localStorage.getItem(this.key) ?? "{}");
        this.rater = typeof found.rater === "string" ? found.rater : "";
        for (const { card } of this.cards) {
          const one = found.answers?.[card];
          if (one) this.answers[card] = this.clean(one);
        }
        localStorage.setItem(this.key, JSON.stringify(this.state()));
        return true;
      } catch {
        return false;
      }
    }

    clean({ interpretable, label, note }) {
      return { interpretable: [...ANSWERS.values()].includes(interpretable) ? interpretable : "",
        label: String(label ?? ""), note: String(note ?? "") };
    }

    state() {
      return { rater: this.rater, answers: this.answers };
    }

    keep() {
      try {
        localStorage.setItem(this.key, JSON.stringify(this.state()));
      } catch {
        this.say("The browser could not keep this answer: save your answers as a file now.");
      }
    }

    // --- the page ---

    guide() {
      const keys = [["y", "n", "u", "answer"], ["j", "k", "next card, card before"],
        ["l", "label"], ["Esc", "leave a field"]];
      return element("details", {},
        element("summary", {}, "How to rate"),
        ...this.deck.instructions.map((text) => element("p", {}, text)),
        element("p", {}, "Keys: ", ...keys.flatMap((row, i) => [i ? "; " : "",
          ...row.slice(0, -1).flatMap((key) => [element("kbd", {}, key), " "]), row.at(-1)]), "."));
    }

    top() {
      this.name = element("input", { type: "text", autocomplete: "off", value: this.rater });
      this.name.addEventListener("input", () => {
        this.rater = this.name.value;
        this.keep();
      });
      const button = (text, act) => {
        const made = element("button", { type: "button" }, text);
        made.addEventListener("click", act);
        return made;
      };
      this.file = element("input", { type: "file", accept: ".csv,text/csv", hidden: true });
      this.file.addEventListener("change", () => this.taken());
      return element("div", { className: "rating-controls", role: "group",
        "aria-label": "Rater and answers" },
      element("label", {}, "Your name or initials ", this.name),
      button("Save answers (CSV)", () => this.save()), this.mail(),
      button("Load a saved CSV", () => this.file.click()), this.file,
      button("Clear all", () => this.clear()));
    }

    /** The answers as a letter, in the reader's own mail program; to whom, the reader says. */
    mail() {
      const made = element("a", { href: "#rating" }, "Mail answers");
      made.addEventListener("click", (event) => {
        if (!this.ready()) event.preventDefault();
        else made.href = `mailto:?subject=${encodeURIComponent(`Ratings of ${this.deck.study}`)
        }&body=${encodeURIComponent(this.csv())}`;
      });
      return made;
    }

    form() {
      this.buttons = new Map([...ANSWERS].map(([key, text]) => {
        const made = element("button", { type: "button", "aria-pressed": "false",
          "aria-keyshortcuts": key }, text, " ", element("kbd", {}, key));
        made.addEventListener("click", () => this.rate(text));
        return [text, made];
      }));
      this.label = element("input", { type: "text", autocomplete: "off" });
      this.note = element("input", { type: "text", autocomplete: "off" });
      this.label.addEventListener("input", () => this.set({ label: this.label.value }));
      this.note.addEventListener("input", () => this.set({ note: this.note.value }));
      const move = (text, label, by) => {
        const made = element("button", { type: "button", "aria-label": label, title: label }, text);
        made.addEventListener("click", () => this.go(this.place + by));
        return made;
      };
      return element("div", { className: "rating-form" },
        element("div", { className: "rating-answers", role: "group",
          "aria-label": "Is it gene-level interpretable?" },
        element("span", {}, "Gene-level interpretable?"), ...this.buttons.values(),
        move("←", "Previous card", -1), move("→", "Next card", 1)), this.status);
    }

    pressed(event) {
      const field = event.target.closest?.("input, textarea, select, [contenteditable]");
      if (event.key === "Escape" && this.box.contains(field)) {
        field.blur();
        return;
      }
      if (field || event.ctrlKey || event.metaKey || event.altKey
          || document.querySelector("dialog[open]")) return;
      const key = event.key.toLowerCase();
      if (ANSWERS.has(key)) this.rate(ANSWERS.get(key));
      else if (key === "j") this.go(this.place + 1);
      else if (key === "k") this.go(this.place - 1);
      else if (key === "l") this.label.focus();
      else return;
      event.preventDefault();
      event.stopPropagation();
    }

    /** A card, or what comes after the last one; its top is brought into view. */
    go(place) {
      if (place < 0 || place > this.cards.length) {
        this.say(place < 0 ? "This is the first card." : "This is the end.");
        return;
      }
      this.place = place;
      this.draw();
      this.card.focus({ preventScroll: true });
      this.count.scrollIntoView({ block: "start" });
    }

    /** An answer, and on to the next card. */
    rate(answer) {
      if (this.place >= this.cards.length) return;
      this.set({ interpretable: answer });
      const said = `${answer} for card ${this.place + 1}.`;
      this.go(this.place + 1);
      this.say(said);
    }

    set(change) {
      if (this.place >= this.cards.length) return;
      const { card } = this.cards[this.place];
      this.answers[card] = { ...this.answer(this.cards[this.place]), ...change };
      this.keep();
      this.mark();
    }

    left() {
      return this.cards.filter((card) => !this.answer(card).interpretable).length;
    }

    say(text) {
      this.status.textContent = text;
    }

    // --- one card ---

    draw() {
      if (this.place === this.cards.length) {
        this.end();
        return;
      }
      const card = this.cards[this.place];
      const { label, note } = this.answer(card);
      this.label.value = label;
      this.note.value = note;
      this.say("");
      const strongest = Math.max(...card.contexts.flatMap(({ pieces }) =>
        pieces.map(({ activation }) => activation)), 0);
      const kinds = [["top", "Strongest contexts"], ["quantile", "Contexts of all strengths"]];
      this.card.replaceChildren(
        element("h2", {}, `Card ${this.place + 1} of ${this.cards.length}`),
        element("p", {}, `Active on one token in ${
          Math.round(10 ** -card.log10_frequency).toLocaleString("en")}.`),
        this.table("Tokens", ["token", "share of its activations", "active on"], card.tokens.map(
          ({ text, share: part, fired, present }) => [text, `${number(100 * part)}\u00a0%`,
            `${fired.toLocaleString("en")} of ${present.toLocaleString("en")} (${
              share(fired, present)})`])),
        this.table("Genes that contain them", ["gene", "token", "active on"], card.genes.map(
          ({ symbol, token, fired, occurrences }) => [symbol, token, this.bar(fired, occurrences)])),
        ...kinds.flatMap(([kind, title]) => {
          const own = card.contexts.filter((one) => one.kind === kind);
          return own.length ? [element("h3", {}, title), element("ol",
            { className: "rating-contexts" }, ...own.map(({ pieces }) =>
              element("li", {}, ...tools.tinted(pieces.map(({ text, activation, gene }) =>
                [text, activation, gene]), strongest, true))))] : [];
        }));
      this.mark();
    }

    /** What comes after the last card. */
    end() {
      const left = this.left();
      this.say("");
      this.card.replaceChildren(element("h2", {}, left ? "The end of the deck"
        : "All cards have an answer"), element("p", {}, left
        ? `${left} of ${this.cards.length} cards are without an answer: the numbers below lead there.`
        : "Thank you. Save the answers as a file, or mail them, below: the file belongs into "
          + "data/human_eval/ of the project, and the next build of the book counts it."));
      this.label.value = "";
      this.note.value = "";
      this.mark();
    }

    bar(part, whole) {
      return element("span", { className: "rating-rate" },
        element("meter", { min: 0, max: Math.max(whole, 1), value: part, "aria-hidden": "true" }),
        ` ${part.toLocaleString("en")} of ${whole.toLocaleString("en")} (${share(part, whole)})`);
    }

    table(title, heads, rows) {
      return element("div", {}, element("h3", {}, title), element("div",
        { className: "table-scroll" }, element("table", { className: "dataframe" },
          element("thead", {}, element("tr", {}, ...heads.map((head) =>
            element("th", { scope: "col" }, head)))),
          element("tbody", {}, ...rows.map((row) => element("tr", {}, ...row.map((value) =>
            element("td", {}, value))))))));
    }

    /** What is answered: the buttons, the strip of cards, the count. */
    mark() {
      const here = this.cards[this.place];
      const now = here ? this.answer(here).interpretable : "";
      for (const [text, button] of this.buttons) {
        button.setAttribute("aria-pressed", String(text === now));
      }
      const done = this.cards.length - this.left();
      this.progress.value = done;
      this.counted.textContent = `${done} of ${this.cards.length} answered`;
      this.strip.replaceChildren(...this.cards.map((card, i) => {
        const said = this.answer(card).interpretable;
        const button = element("button", { type: "button", className: said ? "done" : "",
          "aria-label": `Card ${i + 1}, ${said || "no answer"}` }, String(i + 1));
        if (i === this.place) button.setAttribute("aria-current", "true");
        button.addEventListener("click", () => this.go(i));
        return element("li", {}, button);
      }));
    }

    // --- files ---

    csv() {
      const rows = this.cards.filter((card) => this.answer(card).interpretable).map((card) => {
        const one = this.answer(card);
        return [this.deck.study, card.card, this.rater.trim(), one.interpretable, one.label.trim(),
          one.note.trim()].map(safe).join(",");
      });
      return [COLUMNS.join(","), ...rows, ""].join("\r\n");
    }

    /** Whether there is something to hand over; if not, what is missing is said. */
    ready() {
      if (!this.rater.trim()) {
        this.say("Write your name or initials first: answers need a rater.");
        this.name.focus();
        return false;
      }
      if (this.left() === this.cards.length) this.say("There is no answer to save yet.");
      return this.left() < this.cards.length;
    }

    save() {
      if (!this.ready()) return;
      const name = this.rater.trim().replace(/[^\p{L}\p{N}]+/gu, "_");
      const made = element("a", { download: `${this.deck.study}-${name}.csv`,
        href: URL.createObjectURL(new Blob([this.csv()], { type: "text/csv" })) });
      made.click();
      setTimeout(() => URL.revokeObjectURL(made.href), 60_000);
      const left = this.left();
      this.say(`Saved as ${made.download}${left ? `; ${left} cards are without an answer` : ""}. `
        + "Put the file into data/human_eval/ of the project.");
    }

    async taken() {
      const [file] = this.file.files;
      this.file.value = "";
      if (file) this.take(await file.text(), file.name);
    }

    /** Answers of an own file, over those that are here. Nothing is taken from a wrong one. */
    take(text, name) {
      try {
        const rows = parsed(text).filter((row) => row.interpretable.trim());
        const known = new Set(this.cards.map(({ card }) => card));
        const raters = new Set(rows.map((row) => row.rater.trim()));
        const taken = {};
        for (const row of rows) {
          if (row.study !== this.deck.study) throw new Error(`it is of the study ${row.study}`);
          if (!known.has(row.card)) throw new Error(`it has a card ${row.card} that is not here`);
          const plain = (value) => (/^'[=+\-@\t\r]/.test(value) ? value.slice(1) : value);
          const one = this.clean({ interpretable: row.interpretable.trim(),
            label: plain(row.label ?? ""), note: plain(row.note ?? "") });
          if (!one.interpretable) throw new Error(`it has the answer ${row.interpretable}`);
          taken[row.card] = one;
        }
        if (raters.size > 1) throw new Error("it is of more than one rater");
        Object.assign(this.answers, taken);
        this.rater = [...raters][0] ?? this.rater;
        this.name.value = this.rater;
        this.keep();
        this.draw();
        this.say(`${rows.length} answers taken from ${name}.`);
      } catch (error) {
        this.say(`${name} was not taken: ${error.message}.`);
      }
    }

    clear() {
      if (!window.confirm("Remove all your answers of this study from this browser?")) return;
      this.answers = {};
      this.keep();
      this.go(0);
      this.say("All answers are removed.");
    }
  }

  function start() {
    const box = document.getElementById("rating");
    if (!box) return;
    try {
      new Rating(box, JSON.parse(document.getElementById("rating-deck").textContent)).start();
    } catch (error) {
      console.error(error);
      box.append("The deck could not be read.");
    }
  }
  if (document.readyState === "loading") document.addEventListener("DOMContentLoaded", start);
  else start();
});
