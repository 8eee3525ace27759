/* Circuits to explore: layers upwards, tokens along; hover, click, filter, zoom, or use the keys.

   A page holds a box of the class `circuit` (src/scfm_circuits/circuit_view.py). When it comes
   near, d3 and the circuit's data file are loaded, scripts both: a page opened from disk may load a
   script but not fetch a file. The data file calls companionCircuit(name, view).

   Texts come from strangers: they reach the page through textContent and setAttribute only. */
"use strict";
(window.companionParts ??= []).push(({ element, loaded, whenNear }) => {
  const PITCH = 20;
  const PER_LINE = 4;
  const GAP = { column: 2, row: 26 };
  const MARGIN = { left: 74, right: 8, top: 8, bottom: 126 };
  const HEIGHT = { least: 260, most: 620 };
  const SCALE = { least: 0.58, onPhone: 0.9, start: 1.3, most: 6 };
  const PHONE = 500;
  // Less than the first node's distance from the edge when the whole circuit is in view.
  const EDGE = 5;
  const LABEL_ROOM = 13;
  const LONGEST = 18;
  const LONGEST_TOKEN = 7;
  const LONGEST_GENE = 10;
  const STEPS = 100;
  const KINDS = {
    feature: "features", head: "attention heads", embedding: "embeddings",
    error: "transcoder errors", logit: "logits",
  };
  const received = new Map();

  window.companionCircuit = (name, view) => received.set(name, view);

  const short = (text, most) => (text.length > most ? `${text.slice(0, most - 1)}…` : text);
  const number = (value) => {
    if (value === 0) return "0";
    const size = Math.abs(value);
    const text = size >= 1e5 || size < 1e-3 ? size.toExponential(1) : String(+size.toPrecision(3));
    return value < 0 ? `\u2212${text}` : text;
  };
  const signed = (value) => (value > 0 ? `+${number(value)}` : number(value));
  const percent = (share) => `${number(+(100 * share).toPrecision(2))}\u00a0%`;
  /** A token as a reader can see it: spaces and line ends are marks. */
  const visible = (text) => text.replaceAll("\n", "⏎").replaceAll("\t", "⇥")
    .replace(/^ +| +$/g, (spaces) => "␣".repeat(spaces.length)) || "(empty)";

  /** Marks by kind, all of about one area; not by colour alone. */
  function shape(kind) {
    return {
      feature: d3.symbolCircle, head: d3.symbolDiamond, embedding: d3.symbolSquare,
      error: d3.symbolCross, logit: d3.symbolStar,
    }[kind];
  }

  const turned = (kind) => (kind === "error" ? "rotate(45)" : null);

  class Circuit {
    constructor(box, view) {
      this.box = box;
      this.view = view;
      this.nodes = new Map(view.nodes.map((node) => [node.id, { ...node, into: [], out: [] }]));
      this.edges = view.edges.map((edge) => ({
        ...edge, source: this.nodes.get(edge.source), target: this.nodes.get(edge.target),
      }));
      for (const edge of this.edges) {
        edge.source.out.push(edge);
        edge.target.into.push(edge);
      }
      this.target = this.nodes.get(view.target);
      const carried = this.edges.map((edge) => edge.carried).filter((share) => share > 0);
      this.range = carried.length ? [Math.min(...carried), Math.max(...carried)] : [1, 1];
      this.selected = null;
      this.current = this.target;
    }

    start() {
      this.stage = element("div", { className: "circuit-stage" });
      this.tip = element("div", { className: "circuit-tip", hidden: true, "aria-hidden": "true" });
      this.status = element("p", { className: "circuit-status", role: "status" });
      // The live region stays and its content changes, else nothing would be announced.
      this.about = element("div", { "aria-live": "polite" });
      this.connections = element("div", { className: "circuit-connections" });
      this.closing = element("button", { type: "button" }, "Close");
      this.closing.addEventListener("click", () => this.close());
      this.panel = element("section", { className: "circuit-panel", "aria-label": "Chosen node" },
        this.about, this.connections, this.closing);
      const note = this.box.querySelector(".table-note");
      this.box.querySelector(".circuit-fallback")?.remove();
      note.before(this.filters(), this.stage, this.viewing(), this.status, this.panel);
      this.place();
      this.draw();
      this.stage.append(this.tip);
      this.hint();
      this.filter();
      this.fit();
      let width = this.stage.clientWidth;
      new ResizeObserver(() => {
        if (this.stage.clientWidth === width) return;
        width = this.stage.clientWidth;
        this.fit();
      }).observe(this.stage);
    }

    // --- what the reader handles ---

    filters() {
      this.slider = element("input", { type: "range", min: 0, max: STEPS, step: 1, value: 0 });
      this.least = element("output", {});
      this.sign = element("select", {}, new Option("both", ""),
        new Option("adds", "1"), new Option("takes away", "-1"));
      this.genesOnly = element("input", { type: "checkbox" });
      this.kinds = new Map(this.view.kinds.map((kind) =>
        [kind, element("input", { type: "checkbox", checked: true })]));
      const reset = element("button", { type: "button" }, "Reset filters");
      reset.addEventListener("click", () => {
        this.slider.value = 0;
        this.sign.value = "";
        this.genesOnly.checked = false;
        for (const box of this.kinds.values()) box.checked = true;
        this.filter();
      });
      const group = element("div", {
        className: "circuit-controls", role: "group", "aria-label": "Filter the circuit",
      },
      element("label", {}, "Least weight ", this.slider, " ", this.least),
      element("label", {}, "Sign ", this.sign),
      element("label", {
        title: "Nodes on tokens of genes, and what they lead to",
      }, this.genesOnly, " gene tokens only"),
      ...[...this.kinds].map(([kind, box]) => element("label", {}, box, this.mark(kind),
        KINDS[kind])), reset);
      group.addEventListener("input", () => this.filter());
      return group;
    }

    /** A kind's mark for the legend. */
    mark(kind) {
      const svg = d3.create("svg").attr("class", "circuit-mark").attr("viewBox", "-8 -8 16 16")
        .attr("aria-hidden", "true");
      svg.append("path").attr("class", `node-${kind}`).attr("d", d3.symbol(shape(kind), 90))
        .attr("transform", turned(kind));
      return svg.node();
    }

    viewing() {
      this.beyond = element("span", { className: "circuit-beyond" });
      const button = (text, label, act) => {
        const made = element("button", { type: "button", title: label, "aria-label": label }, text);
        made.addEventListener("click", act);
        return made;
      };
      return element("div", {
        className: "circuit-viewing", role: "group", "aria-label": "View",
      },
      button("+", "Zoom in", () => this.zoom.scaleBy(this.plot, 1.4)),
      button("\u2212", "Zoom out", () => this.zoom.scaleBy(this.plot, 1 / 1.4)),
      button("Reset view", "Reset view", () => this.fit()), this.beyond);
    }

    // --- where things stand ---

    /** Nodes of one row and column stand side by side, in lines of a few. */
    place() {
      const cells = d3.group(this.nodes.values(), (node) => node.row, (node) => node.column);
      const widths = new Array(this.view.columns.length).fill(1);
      const lines = new Array(this.view.rows.length).fill(1);
      for (const [row, columns] of cells) {
        for (const [column, nodes] of columns) {
          widths[column] = Math.max(widths[column], Math.min(PER_LINE, nodes.length));
          lines[row] = Math.max(lines[row], Math.ceil(nodes.length / PER_LINE));
        }
      }
      this.columns = spans(widths, GAP.column);
      this.rows = spans(lines, GAP.row);
      this.width = this.columns.at(-1).end;
      this.height = this.rows.at(-1).end;
      for (const span of this.rows) span.middle = this.height - span.middle;
      for (const [row, columns] of cells) {
        for (const [column, nodes] of columns) {
          const used = Math.ceil(nodes.length / PER_LINE);
          nodes.sort((a, b) => b.influence - a.influence);
          nodes.forEach((node, index) => {
            const line = Math.floor(index / PER_LINE);
            const inLine = Math.min(PER_LINE, nodes.length - line * PER_LINE);
            node.x = this.columns[column].middle
              + (index % PER_LINE - (inLine - 1) / 2) * PITCH;
            node.y = this.rows[row].middle + (line - (used - 1) / 2) * PITCH;
          });
        }
      }
      // Reading order: from the target downwards, along the tokens.
      this.order = [...this.nodes.values()].sort((a, b) => a.y - b.y || a.x - b.x);
    }

    draw() {
      this.svg = d3.select(this.stage).append("svg").attr("class", "circuit-graph")
        .attr("role", "group").attr("aria-label", "Circuit: layers upwards, tokens along");
      this.axes = { rows: this.frame("circuit-rows"), columns: this.frame("circuit-columns") };
      this.window = this.frame("circuit-window");
      this.plot = this.window.append("g");
      this.ground = this.plot.append("rect").attr("class", "circuit-ground");
      this.content = this.plot.append("g");
      this.content.selectAll(null).data(this.rows.filter((_, row) => row % 2 === 0)).join("rect")
        .attr("class", "circuit-band").attr("x", -1e4).attr("width", 2e4)
        .attr("y", (span) => span.middle - (span.end - span.begin) / 2)
        .attr("height", (span) => span.end - span.begin);
      this.drawEdges();
      this.drawNodes();
      this.drawLabels();
      this.zoom = d3.zoom().scaleExtent([SCALE.least, SCALE.most])
        // The page keeps its own scrolling: the wheel zooms with Ctrl or Cmd only.
        .filter((event) => !event.button && (event.type !== "wheel" || event.ctrlKey
          || event.metaKey))
        .on("zoom", ({ transform }) => this.moved(transform));
      this.plot.call(this.zoom).on("dblclick.zoom", null);
    }

    /** A part of the drawing that hides what is outside of it. */
    frame(name) {
      return this.svg.append("svg").attr("class", name);
    }

    drawEdges() {
      const [, top] = this.range;
      const link = d3.linkVertical().x((node) => node.x).y((node) => node.y);
      // Heavy edges lie on top; the data have them first.
      this.lines = this.content.append("g").attr("class", "circuit-edges").attr("fill", "none")
        .selectAll("path").data([...this.edges].reverse(), (edge) => edge.id).join("path")
        .attr("class", (edge) => (edge.weight > 0 ? "adds" : "takes"))
        .attr("stroke-width", (edge) => 0.6 + 4.4 * Math.sqrt(edge.carried / top))
        .attr("d", link);
    }

    drawNodes() {
      const size = d3.scaleSqrt().domain([0, 1]).range([5, 12]);
      this.marks = this.content.append("g").attr("class", "circuit-nodes").attr("role", "listbox")
        .attr("aria-label", "Nodes: arrow keys move, Home goes to the target, Enter chooses")
        .selectAll("g").data(this.order, (node) => node.id).join("g")
        .attr("class", (node) => `node${node === this.target ? " target" : ""}`)
        .attr("transform", (node) => `translate(${node.x},${node.y})`)
        .attr("role", "option").attr("aria-selected", "false").attr("tabindex", -1)
        .attr("aria-label", (node) => this.named(node));
      this.marks.append("circle").attr("class", "hit").attr("r", PITCH / 2);
      this.marks.append("circle").attr("class", "halo")
        .attr("r", (node) => size(node.influence) + 4);
      this.marks.append("path").attr("class", (node) => `node-${node.kind}`)
        .attr("d", (node) => d3.symbol(shape(node.kind), 2.6 * size(node.influence) ** 2)())
        .attr("transform", (node) => turned(node.kind));
      this.marks
        .on("click", (_, node) => this.choose(node))
        .on("pointerenter", (event, node) => event.pointerType !== "touch" && this.point(node))
        .on("pointerleave", () => this.point(null))
        .on("focus", (_, node) => this.point(node))
        .on("blur", () => this.point(null))
        .on("keydown", (event, node) => this.key(event, node));
    }

    drawLabels() {
      this.axes.rows.selectAll("text").data(this.rows).join("text").attr("text-anchor", "end")
        .attr("x", MARGIN.left - 8).attr("dy", "0.32em").text((_, row) => this.view.rows[row]);
      const columns = this.view.columns.map((column, index) => ({
        ...column, index, middle: this.columns[index].middle,
      }));
      this.axes.columns.selectAll("text").data(columns).join("text").attr("text-anchor", "end")
        .attr("class", (column) => (column.gene ? "gene" : null))
        .attr("dy", "0.32em").text((column) => {
          const token = visible(column.text);
          return column.gene && column.gene !== column.text.trim()
            ? `${short(token, LONGEST_TOKEN)} (${short(column.gene, LONGEST_GENE)})`
            : short(token, LONGEST);
        });
    }

    /** Set the sizes to the page's width, and show the whole circuit or as much as is readable. */
    fit() {
      const width = Math.max(120, this.stage.clientWidth - MARGIN.left - MARGIN.right);
      const whole = Math.min(SCALE.start, width / this.width);
      const scale = Math.max(whole, width < PHONE ? SCALE.onPhone : SCALE.least);
      const height = Math.max(HEIGHT.least, Math.min(HEIGHT.most, this.height * scale));
      Object.assign(this, { visibleWidth: width, visibleHeight: height });
      this.svg.attr("width", MARGIN.left + width + MARGIN.right)
        .attr("height", MARGIN.top + height + MARGIN.bottom);
      const sized = (frame, x, y, w, h) => frame.attr("x", x).attr("y", y).attr("width", w)
        .attr("height", h);
      sized(this.window, MARGIN.left, MARGIN.top, width, height);
      sized(this.axes.rows, 0, MARGIN.top, MARGIN.left, height);
      sized(this.axes.columns, MARGIN.left, MARGIN.top + height, width, MARGIN.bottom);
      this.ground.attr("width", width).attr("height", height);
      const slack = 40;
      this.zoom.extent([[0, 0], [width, height]])
        .scaleExtent([Math.min(whole, SCALE.least), SCALE.most])
        .translateExtent([
          [-slack - width, -slack - height],
          [this.width + slack + width, this.height + slack + height]]);
      const span = scale * this.width;
      const x = span <= width ? (width - span) / 2
        : Math.min(0, Math.max(width - span, width / 2 - scale * this.target.x));
      const y = Math.max(0, (height - scale * this.height) / 2);
      this.zoom.transform(this.plot, d3.zoomIdentity.translate(x, y).scale(scale));
    }

    moved(transform) {
      this.transform = transform;
      this.content.attr("transform", transform);
      this.axes.rows.selectAll("text").attr("y", (span) => transform.applyY(span.middle));
      let last = -Infinity;
      // A token whose nodes are all filtered out has no label. Where labels stand too close, every
      // one that has room is shown; the target's always.
      const occupied = new Set([...this.present].map((node) => node.column));
      const target = transform.applyX(this.columns[this.target.column].middle);
      this.axes.columns.selectAll("text").each(function (column) {
        const x = transform.applyX(column.middle);
        const shown = x === target || (occupied.has(column.index)
          && x - last >= LABEL_ROOM && Math.abs(x - target) >= LABEL_ROOM);
        if (shown) last = x;
        d3.select(this).attr("transform", `translate(${x},6) rotate(-90)`)
          .attr("visibility", shown ? null : "hidden");
      });
      const across = [...this.present].map((node) => transform.applyX(node.x));
      const sides = [across.some((x) => x < 0) && "\u2190 more to the left",
        across.some((x) => x > this.visibleWidth) && "more to the right \u2192"];
      this.beyond.textContent = sides.filter(Boolean).join("; ");
      if (this.pointed) this.showTip(this.pointed);
    }

    // --- what is shown ---

    get threshold() {
      const step = Number(this.slider.value);
      const [low, high] = this.range;
      // The last step is the heaviest edge itself, whatever rounding says.
      return step === 0 ? 0 : step === STEPS ? high : low * (high / low) ** (step / STEPS);
    }

    filter() {
      const least = this.threshold;
      const sign = Number(this.sign.value);
      const allowed = (node) => node === this.target || this.kinds.get(node.kind).checked;
      const passing = this.edges.filter((edge) => edge.carried >= least
        && (!sign || Math.sign(edge.weight) === sign)
        && allowed(edge.source) && allowed(edge.target));
      this.shown = new Set(this.genesOnly.checked ? fromGenes(passing) : passing);
      const ends = new Set([this.target, this.selected]);
      for (const edge of this.shown) ends.add(edge.source).add(edge.target);
      ends.delete(null);
      this.present = ends;
      this.lines.attr("display", (edge) => (this.shown.has(edge) ? null : "none"));
      this.marks.attr("display", (node) => (ends.has(node) ? null : "none"));
      if (!ends.has(this.current)) this.current = this.target;
      this.marks.attr("tabindex", (node) => (node === this.current ? 0 : -1));
      this.say(least);
      if (this.transform) this.moved(this.transform);
      if (this.selected) this.lists();
    }

    say(least) {
      const { view } = this;
      this.least.textContent = least ? `≥ ${percent(least)}` : "all";
      this.slider.setAttribute("aria-valuetext", least ? `at least ${percent(least)}` : "all edges");
      const parts = [`${this.shown.size} of ${this.edges.length} edges and ${this.present.size} of `
        + `${this.nodes.size} nodes shown.`];
      if (view.edges.length < view.total_edges) {
        parts.push(`The figure has the heaviest ${view.edges.length} of the circuit's `
          + `${view.total_edges} edges.`);
      }
      this.status.textContent = parts.join(" ");
    }

    /** What a node is, in one line. */
    named(node) {
      const gene = node.gene ? ` of ${node.gene}` : "";
      const what = node === this.target ? `${node.label} (the target)` : node.label;
      return `${what}, token ${visible(node.token)}${gene}`;
    }

    briefly(node) {
      return `${node.label}, at ${visible(node.token)}${node.gene ? ` (${node.gene})` : ""}`;
    }

    /** Light up a node's edges and show its tooltip; without a node, those of the chosen one. */
    point(node) {
      this.pointed = node;
      const lit = node ?? this.selected;
      const touches = (edge) => edge.source === lit || edge.target === lit;
      const near = new Set(lit ? [lit, ...lit.into.filter((edge) => this.shown.has(edge))
        .map((edge) => edge.source), ...lit.out.filter((edge) => this.shown.has(edge))
        .map((edge) => edge.target)] : []);
      this.svg.classed("focused", Boolean(lit));
      this.lines.classed("lit", (edge) => lit !== null && touches(edge));
      this.marks.classed("lit", (other) => near.has(other));
      if (node) this.showTip(node);
      else this.tip.hidden = true;
    }

    showTip(node) {
      const lines = [node.label, `token ${visible(node.token)}${node.gene
        ? ` of ${node.gene}` : ""}`, `${node.value_name} ${number(node.value)}`,
      `influence ${percent(node.influence)}`];
      this.tip.replaceChildren(...lines.map((line) => element("div", {}, line)));
      this.tip.hidden = false;
      const [x, y] = this.transform.apply([node.x, node.y]);
      const left = MARGIN.left + x + 14;
      const room = this.stage.clientWidth - this.tip.offsetWidth;
      // Beside the node, on the side that has room, and never on it.
      const beside = left <= room ? left : MARGIN.left + x - 14 - this.tip.offsetWidth;
      this.tip.style.left = `${Math.max(0, Math.min(beside, room))}px`;
      const above = MARGIN.top + y - this.tip.offsetHeight - 14;
      this.tip.style.top = `${beside < 0 && above >= 0 ? above : Math.max(0, MARGIN.top + y + 10)}px`;
    }

    // --- keys ---

    key(event, node) {
      const moves = {
        ArrowRight: () => this.along(node, 1), ArrowLeft: () => this.along(node, -1),
        ArrowUp: () => this.across(node, -1), ArrowDown: () => this.across(node, 1),
        Home: () => this.target, End: () => this.along(this.order[0], -1),
      };
      if (event.ctrlKey || event.metaKey || event.altKey) return;
      if (event.key in moves) this.go(moves[event.key]() ?? node);
      else if (event.key === "Enter" || event.key === " ") this.choose(node);
      else if (event.key === "Escape") this.choose(null);
      else return;
      event.preventDefault();
    }

    /** The next node in reading order; after the last one comes the first. */
    along(node, step) {
      const there = this.order.filter((other) => this.present.has(other));
      const { length } = there;
      return there[(there.indexOf(node) + step + length) % length];
    }

    /** The nearest node of the next occupied line above or below. */
    across(node, step) {
      const there = [...this.present].filter((other) => Math.sign(other.y - node.y) === step);
      return d3.least(there, (a, b) => Math.abs(a.y - node.y) - Math.abs(b.y - node.y)
        || Math.abs(a.x - node.x) - Math.abs(b.x - node.x));
    }

    /** Move the focus. */
    go(node) {
      this.current = node;
      this.marks.attr("tabindex", (other) => (other === node ? 0 : -1));
      this.reveal(node);
      this.marks.filter((other) => other === node).node().focus({ preventScroll: true });
    }

    /** Move the view if a node is outside of it. */
    reveal(node) {
      const [x, y] = this.transform.apply([node.x, node.y]);
      const { k } = this.transform;
      const outside = (place, end) => place < EDGE || place > end - EDGE;
      const across = outside(x, this.visibleWidth);
      const upright = outside(y, this.visibleHeight);
      if (!across && !upright) return;
      this.zoom.translateBy(this.plot, across ? (this.visibleWidth / 2 - x) / k : 0,
        upright ? (this.visibleHeight / 2 - y) / k : 0);
    }

    // --- the panel ---

    hint() {
      this.connections.replaceChildren();
      this.closing.hidden = true;
      this.about.replaceChildren(element("p", { className: "circuit-hint" },
        "Choose a node by a click, or with the arrow keys and Enter, to see its tokens, genes and "
        + "edges. Lines are wider the more of the target's contributions they carry (their "
        + "weight); solid lines add, dashed lines take away. Drag to move; Ctrl and the wheel, two "
        + "fingers or the buttons zoom."));
    }

    choose(node) {
      this.selected = node;
      if (node) this.current = node;
      this.marks.attr("aria-selected", (other) => String(other === node))
        .classed("chosen", (other) => other === node);
      this.filter();
      this.point(null);
      if (!node) {
        this.hint();
        return;
      }
      this.title = element("h3", { tabIndex: -1 }, node === this.target
        ? `${node.label} (the target)` : node.label);
      this.about.replaceChildren(this.title, this.facts(node));
      this.reveal(node);
      this.closing.hidden = false;
    }

    close() {
      const last = this.selected;
      this.choose(null);
      this.go(this.present.has(last) ? last : this.target);
    }

    facts(node) {
      const facts = [
        [node.kind === "head" ? "token read" : "token",
          `${visible(node.token)} (number ${node.position + 1})`],
        ["gene", node.gene],
        [node.value_name, number(node.value)],
        ["influence", `${percent(node.influence)} of the target's contributions`],
        ["fires most on", node.tokens.length && node.tokens.map((token) =>
          element("span", { className: "circuit-token" }, visible(token)))],
        ["its genes", node.genes.join(" ") + (node.n_genes > node.genes.length
          ? ` … (${node.n_genes} in all)` : "")],
        ["best term", node.term],
        ["more", node.kind === "feature" && element("a",
          { href: `features.html#L${node.layer}.F${node.index}` }, "this feature in the index")],
      ];
      return element("dl", {}, ...facts.filter(([, text]) => text).flatMap(([name, text]) =>
        [element("dt", {}, name), element("dd", {}, ...[text].flat())]));
    }

    /** Both lists of edges, the heaviest first; what the filters hide is counted. */
    lists() {
      const node = this.selected;
      this.connections.replaceChildren(
        this.list("Receives from", node.into, (edge) => edge.source),
        this.list("Contributes to", node.out, (edge) => edge.target),
        element("p", { className: "circuit-hint" }, "Before each node the contribution, in units "
          + "of the value it is part of; after it the weight, the share of the target's "
          + "contributions that the edge carries."));
    }

    list(title, edges, other) {
      const shown = edges.filter((edge) => this.shown.has(edge))
        .sort((a, b) => Math.abs(b.weight) - Math.abs(a.weight));
      const count = shown.length < edges.length ? `${shown.length} of ${edges.length}`
        : String(edges.length);
      const items = shown.map((edge) => {
        const button = element("button", { type: "button" },
          element("span", { className: edge.weight > 0 ? "adds" : "takes" }, signed(edge.weight)),
          element("span", {}, this.briefly(other(edge))),
          element("span", { className: "carried" }, percent(edge.carried)));
        button.addEventListener("click", () => {
          this.choose(other(edge));
          this.title.focus();
        });
        return element("li", {}, button);
      });
      return element("div", {}, element("h4", {}, `${title} (${count})`),
        items.length ? element("ol", {}, ...items) : element("p", {}, "none"));
    }
  }

  /** Where equal-pitched cells of several widths begin, end and have their middle. */
  function spans(sizes, gap) {
    let end = 0;
    return sizes.map((size) => {
      const begin = end;
      end = begin + size * PITCH + gap;
      return { begin, end, middle: (begin + end) / 2 };
    });
  }

  /** The edges that start at a node on a gene's token, or downstream of one. */
  function fromGenes(edges) {
    const leaving = d3.group(edges, (edge) => edge.source);
    const kept = new Set();
    const open = [...leaving.keys()].filter((node) => node.gene);
    const seen = new Set(open);
    while (open.length) {
      for (const edge of leaving.get(open.pop()) ?? []) {
        kept.add(edge);
        if (!seen.has(edge.target)) {
          seen.add(edge.target);
          open.push(edge.target);
        }
      }
    }
    return kept;
  }

  /** Load and draw one circuit; if that fails, the link to its file stays. */
  async function takeOver(box) {
    try {
      await loaded(box.dataset.library);
      await loaded(box.dataset.source);
      new Circuit(box, received.get(box.dataset.circuit)).start();
    } catch {
      box.querySelector(".table-note").append("; the figure could not be loaded");
    }
  }

  whenNear(".circuit[data-source]", takeOver);
});
