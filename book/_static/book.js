/* What every page has: the switch that shows its code, tables that say whose column a number is
   where the page is narrow, and what the run adds to the search. */
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

  /* A table that holds the paper's numbers, and is wider than a phone, has a line per number. */
  function stackTables() {
    for (const table of document.querySelectorAll(".table-scroll > table.dataframe")) {
      const heads = [...table.querySelectorAll("thead th")].map((head) => head.textContent);
      if (table.closest(".browse") || !heads.some((head) => /paper/i.test(head))) continue;
      for (const row of table.tBodies[0]?.rows ?? []) {
        [...row.cells].forEach((cell, i) => { cell.dataset.label = heads[i] ?? ""; });
      }
      table.classList.add("stacks");
    }
  }

  document.addEventListener("DOMContentLoaded", () => {
    codeSwitch();
    stackTables();
  });
})();
