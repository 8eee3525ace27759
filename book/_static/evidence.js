/* What a feature fires on, drawn alike in the circuits, the index and on the rating page: texts
   whose tokens are tinted by activation, and bars by cell type. All texts are set as text. */
"use strict";
(window.companionParts ??= []).push((tools) => {
  const { element } = tools;
  const number = (value) => String(Number(value.toPrecision(3))).replace("-", "\u2212");
  const percent = (share) => `${number(+(100 * share).toPrecision(2))}\u00a0%`;

  /** Tokens [text, activation, gene], the active ones tinted up to `strongest`; those of one gene
      stand together. numbers: whether active tokens carry their activation. */
  function tinted(pieces, strongest, numbers = false) {
    const shown = [];
    let before = null;
    for (const [text, activation, gene] of pieces) {
      const active = activation > 0;
      const token = element(active ? "mark" : "span", { className: "heat-token" },
        text.replace(/^_/, ""));
      if (active) {
        token.style.setProperty("--strength",
          `${Math.round(15 + (45 * activation) / strongest)}%`);
        token.title = number(activation);
        if (numbers) {
          token.append(element("sub", {}, element("span", { className: "heat-hidden" },
            " active: "), number(activation)));
        }
      }
      const apart = text.startsWith("_");
      if (!shown.length || gene !== before || apart) {
        shown.push(apart ? " " : "", element("span", { className: "heat-gene",
          title: gene ?? "" }));
      }
      shown.at(-1).append(token);
      before = gene;
    }
    return shown;
  }

  /** Contexts [activation, where, tokens] as a list. */
  function heat(contexts) {
    const strongest = Math.max(...contexts.flatMap(([activation, , pieces]) => [activation,
      ...pieces.map((piece) => piece[1])]), 1e-9);
    return element("ol", { className: "heat" }, ...contexts.map(([activation, where, pieces]) =>
      element("li", {}, element("span", { className: "heat-where" },
        `${number(activation)} · ${where}`), element("br"), ...tinted(pieces, strongest))));
  }

  /** Rows [name, share, cells] with a bar each. */
  function bars(rows) {
    const most = Math.max(...rows.map(([, share]) => share), 1e-9);
    return element("table", { className: "type-bars" }, element("tbody", {},
      ...rows.map(([name, share, cells]) => {
        const bar = element("span", { className: "type-bar", "aria-hidden": "true" });
        bar.style.width = `${(100 * share) / most}%`;
        return element("tr", {}, element("th", { scope: "row" }, name),
          element("td", {}, bar), element("td", { className: "number" }, percent(share)),
          element("td", { className: "number" }, `${cells} cells`));
      })));
  }

  Object.assign(tools, { tinted, heat, bars });
});
