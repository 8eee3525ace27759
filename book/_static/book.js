/* What every page has: the switch that shows its code, tables that can be read where the page is
   narrow, and what the run adds to the search. */
"use strict";
(() => {
  const CODE = "companion-code";
  const root = document.documentElement;

  // A page opened from disk may have no storage; the switch then holds for the page alone.
  const remembered = () => { try { return localStorage.getItem(CODE); } catch { return null; } };
  const remember = (value) => { try { localStorage.setItem(CODE, value); } catch { /* as said */ } };

  // Before anything is drawn.
  root.dataset.code = remembered() === "shown" ? "shown" : "hidden";

  function codeSwitch() {
    const place = document.querySelector(".article-header-buttons");
    if (!place || !document.querySelector(".bd-article .cell_input")) return;
    const button = document.createElement("button");
    button.type = "button";
    button.className = "btn btn-sm code-switch";
    button.setAttribute("role", "switch");
    button.textContent = "Show code";
    const show = (shown) => {
      root.dataset.code = shown ? "shown" : "hidden";
      button.setAttribute("aria-checked", String(shown));
    };
    show(root.dataset.code === "shown");
    button.addEventListener("click", () => {
      show(root.dataset.code !== "shown");
      remember(root.dataset.code);
    });
    place.prepend(button);
  }

  const LONG = 40;  // rows; a longer table is scrolled, or the page would have no end

  /* On a phone a table that holds the paper's numbers has a line per number. */
  function stackTables() {
    for (const table of document.querySelectorAll(".table-scroll > table.dataframe")) {
      const heads = [...table.querySelectorAll("thead th")].map((head) => head.textContent);
      if (table.closest(".browse") || table.rows.length > LONG
        || !heads.some((head) => /paper/i.test(head))) continue;
      for (const row of table.tBodies[0]?.rows ?? []) {
        [...row.cells].forEach((cell, i) => { cell.dataset.label = heads[i] ?? ""; });
      }
      table.classList.add("stacks");
    }
  }

  /* What is wider than its box and not scrolled to its end says so. */
  function fadeWhatGoesOn() {
    const look = (box) => box.classList.toggle(
      "goes-on", box.scrollLeft + box.clientWidth < box.scrollWidth - 4);
    const sizes = new ResizeObserver((seen) => seen.forEach(({ target }) =>
      look(target.closest(".may-go-on"))));
    const kinds = [".table-scroll", ".pst-scrollable-table-container",
      ".bd-article div.math", ".bd-article div.math mjx-container"]
      .map((kind) => `${kind}:not(.may-go-on)`).join();
    const find = () => {
      for (const box of document.querySelectorAll(kinds)) {
        box.classList.add("may-go-on");
        box.addEventListener("scroll", () => look(box), { passive: true });
        [box, ...box.children].forEach((part) => sizes.observe(part));
      }
    };
    find();
    // The index of features writes its tables later; formulas are set later.
    for (const later of document.querySelectorAll(".features, .bd-article div.math")) {
      new MutationObserver(find).observe(later, { childList: true, subtree: true });
    }
  }

  /* Genes, terms and features of the run, above the pages that the search finds. */
  function searchRun() {
    const asked = (new URLSearchParams(location.search).get("q") ?? "").trim();
    const place = document.getElementById("search-results");
    if (!place || !asked) return;
    const most = 12;
    const words = asked.toLowerCase().split(/\s+/);
    const holds = (text) => words.every((word) => text.toLowerCase().includes(word));
    const link = (hash, text, note) => {
      const item = document.createElement("li");
      const anchor = document.createElement("a");
      anchor.href = `features.html#${hash}`;
      anchor.textContent = text;
      item.append(anchor, ` ${note}`);
      return item;
    };
    window.companionSearch = (kind, run) => {
      const query = (text) => String(new URLSearchParams({ q: text }));
      const listed = (pairs, what) => pairs.filter(([text]) => holds(text))
        // The word itself before longer ones.
        .sort(([a], [b]) => (b.toLowerCase() === asked.toLowerCase())
          - (a.toLowerCase() === asked.toLowerCase()))
        .map(([text, n]) => link(query(text), text, `${what} ${n} feature${n === 1 ? "" : "s"}`));
      const found = [
        ...run.features.filter((name) => name.toLowerCase() === asked.toLowerCase())
          .map((name) => link(name, name, "feature")),
        ...listed(run.genes, "gene, in the lists of"), ...listed(run.terms, "best term of")];
      const box = document.createElement("section");
      box.className = "found-in-run";
      const head = document.createElement("h2");
      head.textContent = "Genes, terms and features of this run";
      const list = document.createElement("ul");
      list.append(...found.slice(0, most));
      const rest = document.createElement("p");
      if (!found.length) rest.textContent = "None of them holds these words.";
      if (found.length > most) rest.textContent = `and ${found.length - most} more`;
      box.append(head, list, rest);
      place.before(box);
    };
    const script = document.createElement("script");
    script.src = `${root.dataset.content_root ?? "./"}search_words.js`;
    document.head.append(script);
  }

  document.addEventListener("DOMContentLoaded", () => {
    codeSwitch();
    stackTables();
    fadeWhatGoesOn();
    searchRun();
  });
})();
