/* The drawing of a circuit (circuit.js): layers upwards, tokens along, the whole of it in view.

   Only places zoom; marks and letters keep their size. Rows and tokens without a visible node take
   no room. A click or a touch chooses the nearest node. Texts are set as text. */
"use strict";
(window.companionParts ??= []).push((tools) => {
  const { element } = tools;
  const PER_LINE = 4;
  const MARGIN = { left: 74, right: 10, top: 12, bottom: 138 };
  const HEIGHT = { least: 240, most: 460, line: 30 };
  const MOST_ZOOM = 12;
  const RADIUS = { least: 2.6, most: 9 };
  const NEAR = 22;
  // Less than the first node's distance from the edge when the whole circuit is in view.
  const EDGE = 3;
  const LABEL_ROOM = 13;
  const LETTER = 6.8;
  // Where a picture is narrower, most of it is edges: names of nodes nobody asked for wait for a zoom.
  const WIDE_ENOUGH = 420;
  const LONGEST = { text: 18, token: 7, gene: 10, label: 26 };

  /** Marks by kind, all of about one area; not by colour alone. */
  const shape = (kind) => ({
    feature: d3.symbolCircle, head: d3.symbolDiamond, embedding: d3.symbolSquare,
    error: d3.symbolCross, logit: d3.symbolStar,
  })[kind];
  const turned = (kind) => (kind === "error" ? "rotate(45)" : null);

  const texts = {
    short: (text, most) => (text.length > most ? `${text.slice(0, most - 1)}…` : text),
    number: (value) => {
      if (value === 0) return "0";
      const size = Math.abs(value);
      const text = size >= 1e5 || size < 1e-3 ? size.toExponential(1)
        : String(+size.toPrecision(3));
      return value < 0 ? `\u2212${text}` : text;
    },
    percent: (share) => `${texts.number(+(100 * share).toPrecision(2))}\u00a0%`,
    /** A token as a reader can see it: spaces and line ends are marks. */
    visible: (text) => text.replaceAll("\n", "⏎").replaceAll("\t", "⇥")
      .replace(/^ +| +$/g, (spaces) => "␣".repeat(spaces.length)) || "(empty)",
  };
  const { short, number, percent, visible } = texts;

  /** A kind's mark for the legend. */
  function mark(kind) {
    const svg = d3.create("svg").attr("class", "circuit-mark").attr("viewBox", "-8 -8 16 16")
      .attr("aria-hidden", "true");
    svg.append("path").attr("class", `node-${kind}`).attr("d", d3.symbol(shape(kind), 90))
      .attr("transform", turned(kind));
    return svg.node();
  }

  /** Where the cells of a row or column begin, end and have their middle. */
  function spans(sizes, gap) {
    let end = 0;
    return sizes.map((size) => {
      const begin = end;
      end = begin + (size ? size + gap : 0);
      return { begin, end, middle: (begin + end) / 2, used: size > 0 };
    });
  }

  class Graph {
    /** owner: has `target`, `nodes`, `edges`, `view`, `selected`, `pins`, and is asked to choose,
        pin and name nodes. */
    constructor(stage, owner) {
      Object.assign(this, { stage, owner, current: owner.target, pointed: null });
      this.present = new Set(owner.nodes.values());
      this.shown = new Set(owner.edges);
      this.top = Math.max(...owner.edges.map((edge) => edge.carried), 1e-9);
      stage.replaceChildren();
      this.tip = element("div", { className: "circuit-tip", hidden: true, "aria-hidden": "true" });
      this.draw();
      stage.append(this.tip);
    }

    // --- where things stand ---

    /** Nodes of one row and column stand side by side, in lines of a few. */
    place() {
      const { columns, rows } = this.owner.view;
      const cells = d3.group([...this.present], (node) => node.row, (node) => node.column);
      const [widths, lines] = [columns, rows].map((all) => new Array(all.length).fill(0));
      for (const [row, inRow] of cells) {
        for (const [column, nodes] of inRow) {
          widths[column] = Math.max(widths[column], Math.min(PER_LINE, nodes.length));
          lines[row] = Math.max(lines[row], Math.ceil(nodes.length / PER_LINE));
        }
      }
      this.columns = spans(widths, 0.25);
      this.rows = spans(lines, 1);
      [this.width, this.height] = [this.columns.at(-1).end, this.rows.at(-1).end];
      for (const span of this.rows) span.middle = this.height - span.middle;
      for (const [row, inRow] of cells) {
        for (const [column, nodes] of inRow) this.placeCell(nodes, this.columns[column],
          this.rows[row]);
      }
      // Reading order: from the target downwards, along the tokens.
      this.order = [...this.present].sort((a, b) => a.y - b.y || a.x - b.x);
    }

    placeCell(nodes, column, row) {
      const used = Math.ceil(nodes.length / PER_LINE);
      nodes.sort((a, b) => b.influence - a.influence);
      nodes.forEach((node, index) => {
        const line = Math.floor(index / PER_LINE);
        const inLine = Math.min(PER_LINE, nodes.length - line * PER_LINE);
        node.x = column.middle + (index % PER_LINE - (inLine - 1) / 2);
        node.y = row.middle + (line - (used - 1) / 2);
      });
    }

    draw() {
      this.svg = d3.select(this.stage).append("svg").attr("class", "circuit-graph")
        .attr("role", "group").attr("aria-label", "Circuit: layers upwards, tokens along");
      this.axes = { rows: this.frame("circuit-rows"), columns: this.frame("circuit-columns") };
      this.window = this.frame("circuit-window");
      this.ground = this.window.append("rect").attr("class", "circuit-ground");
      this.bands = this.window.append("g");
      const lines = this.window.append("g").attr("class", "circuit-edges").attr("fill", "none");
      // Heavy edges lie on top; the data have them first.
      this.lines = lines.selectAll("path").data([...this.owner.edges].reverse(), (edge) => edge.id)
        .join("path").attr("class", (edge) => (edge.weight > 0 ? "adds" : "takes"))
        .attr("stroke-width", (edge) => 0.6 + 4.4 * Math.sqrt(edge.carried / this.top));
      this.marks = this.drawNodes();
      this.labels = this.window.append("g").attr("class", "circuit-labels")
        .attr("aria-hidden", "true");
      this.zoom = d3.zoom().scaleExtent([1, MOST_ZOOM])
        // The page keeps its own scrolling: the wheel zooms with Ctrl or Cmd only.
        .filter((event) => !event.button && (event.type !== "wheel" || event.ctrlKey
          || event.metaKey))
        .on("zoom", ({ transform }) => this.moved(transform));
      this.window.call(this.zoom).on("dblclick.zoom", null)
        .on("click", (event) => this.clicked(event))
        .on("pointermove", (event) => event.pointerType !== "touch" && this.hover(event))
        .on("pointerleave", () => this.point(null));
    }

    /** A part of the drawing that hides what is outside of it. */
    frame(name) {
      return this.svg.append("svg").attr("class", name);
    }

    drawNodes() {
      const marks = this.window.append("g").attr("class", "circuit-nodes").attr("role", "listbox")
        .attr("aria-label", "Nodes: arrow keys move, Home goes to the target, Enter chooses, "
          + "P pins")
        .selectAll("g").data([...this.owner.nodes.values()], (node) => node.id).join("g")
        .attr("class", (node) => `node${node === this.owner.target ? " target" : ""}`)
        .attr("role", "option").attr("aria-selected", "false").attr("tabindex", -1);
      marks.append("circle").attr("class", "halo");
      marks.append("path").attr("class", (node) => `node-${node.kind}`)
        .attr("transform", (node) => turned(node.kind));
      return marks.on("click", (event, node) => {
        event.stopPropagation();
        this.owner.choose(node);
      })
        .on("pointerenter", (event, node) => event.pointerType !== "touch" && this.point(node))
        .on("focus", (_, node) => this.point(node))
        .on("blur", () => this.point(null))
        .on("keydown", (event, node) => this.key(event, node));
    }

    // --- what is shown ---

    /** Show some edges and nodes, all of them in view. */
    show(present, shown) {
      Object.assign(this, { present, shown });
      if (!present.has(this.current)) this.current = this.owner.target;
      this.lines.attr("display", (edge) => (shown.has(edge) ? null : "none"));
      this.marks.attr("display", (node) => (present.has(node) ? null : "none"))
        .attr("aria-label", (node) => this.owner.named(node));
      this.place();
      const rank = new Map(this.order.map((node, index) => [node, index]));
      this.marks.sort((a, b) => (rank.get(a) ?? -1) - (rank.get(b) ?? -1));
      this.stop(this.current);
      this.fit();
    }

    /** Set the sizes to the page's width, and show the whole circuit. */
    fit() {
      const width = Math.max(120, this.stage.clientWidth - MARGIN.left - MARGIN.right);
      const most = this.owner.full ? Math.max(HEIGHT.least,
        innerHeight * 0.62 - MARGIN.top - MARGIN.bottom) : HEIGHT.most;
      const height = this.owner.full ? most
        : Math.max(HEIGHT.least, Math.min(most, this.height * HEIGHT.line));
      Object.assign(this, { visibleWidth: width, visibleHeight: height });
      // One unit is the place of one node; a small circuit is not blown up.
      this.unit = [Math.min(48, width / this.width), height / this.height];
      this.shift = (width - this.unit[0] * this.width) / 2;
      this.svg.attr("width", MARGIN.left + width + MARGIN.right)
        .attr("height", MARGIN.top + height + MARGIN.bottom);
      const sized = (frame, x, y, w, h) => frame.attr("x", x).attr("y", y).attr("width", w)
        .attr("height", h);
      sized(this.window, MARGIN.left, MARGIN.top, width, height);
      sized(this.axes.rows, 0, MARGIN.top, MARGIN.left, height);
      sized(this.axes.columns, MARGIN.left, MARGIN.top + height, width + MARGIN.right,
        MARGIN.bottom);
      this.ground.attr("width", width).attr("height", height);
      this.zoom.extent([[0, 0], [width, height]]).translateExtent([[0, 0], [width, height]]);
      this.window.call(this.zoom.transform, d3.zoomIdentity);
    }

    at(node) {
      return this.transform.apply([this.shift + node.x * this.unit[0], node.y * this.unit[1]]);
    }

    radius(node) {
      const [across, up] = this.unit;
      const most = Math.min(RADIUS.most, Math.max(1.3 * RADIUS.least,
        0.62 * Math.min(across, up) * this.transform.k));
      return RADIUS.least + (most - RADIUS.least) * Math.sqrt(Math.min(1, node.influence));
    }

    moved(transform) {
      this.transform = transform;
      const link = d3.linkVertical().source(({ source }) => this.at(source))
        .target(({ target }) => this.at(target));
      this.lines.filter((edge) => this.shown.has(edge)).attr("d", link);
      const seen = this.marks.filter((node) => this.present.has(node))
        .attr("transform", (node) => `translate(${this.at(node)})`);
      seen.select(".halo").attr("r", (node) => this.radius(node) + 4);
      seen.select("path").attr("d", (node) =>
        d3.symbol(shape(node.kind), 3 * this.radius(node) ** 2)());
      this.drawAxes();
      this.drawLabels();
      const across = [...this.present].map((node) => this.at(node)[0]);
      const sides = [across.some((x) => x < 0) && "\u2190 more to the left",
        across.some((x) => x > this.visibleWidth) && "more to the right \u2192"];
      this.owner.beyond.textContent = sides.filter(Boolean).join("; ");
      if (this.pointed) this.showTip(this.pointed);
    }

    drawAxes() {
      const { view, target } = this.owner;
      const rows = this.rows.map((span, row) => ({ ...span, row })).filter((span) => span.used);
      const y = (place) => this.transform.applyY(place * this.unit[1]);
      this.axes.rows.selectAll("text").data(rows, (span) => span.row).join("text")
        .attr("text-anchor", "end").attr("x", MARGIN.left - 8).attr("dy", "0.32em")
        .attr("y", (span) => y(span.middle)).text((span) => view.rows[span.row]);
      this.bands.selectAll("rect").data(rows.filter((_, i) => i % 2 === 0)).join("rect")
        .attr("class", "circuit-band").attr("width", this.visibleWidth)
        .attr("y", (span) => y(span.middle - (span.end - span.begin) / 2))
        .attr("height", (span) => (span.end - span.begin) * this.unit[1] * this.transform.k);
      // Where labels stand too close, every one that has room is shown; the target's always, and
      // the more influential token first.
      const weights = d3.rollup(this.present, (nodes) => d3.sum(nodes, (node) => node.influence),
        (node) => node.column);
      const columns = this.columns.map((span, index) => ({ ...view.columns[index], index,
        x: this.transform.applyX(this.shift + span.middle * this.unit[0]) }))
        .filter(({ index }) => weights.has(index));
      const taken = [];
      const shown = d3.sort(columns, ({ index }) => (index === target.column ? -Infinity
        : -weights.get(index))).filter(({ x }) => {
        const free = x > -4 && x < this.visibleWidth + 8
          && taken.every((other) => Math.abs(other - x) >= LABEL_ROOM);
        if (free) taken.push(x);
        return free;
      }).sort((a, b) => a.index - b.index);
      this.axes.columns.selectAll("text").data(shown, (column) => column.index).join("text")
        .attr("text-anchor", "end").attr("class", (column) => (column.gene ? "gene" : null))
        .attr("dy", "0.32em").attr("transform", ({ x }) => `translate(${x},6) rotate(-90)`)
        .text((column) => {
          const token = visible(column.text);
          return column.gene && column.gene !== column.text.trim()
            ? `${short(token, LONGEST.token)} (${short(column.gene, LONGEST.gene)})`
            : short(token, LONGEST.text);
        }).order();
    }

    /** Names beside nodes, the most important first, where they cover no other name and no mark (only
        the names of what is chosen, the target and pins may cover marks). */
    drawLabels() {
      const { owner } = this;
      const first = (node) => (node === owner.selected ? 4 : node === owner.target ? 3
        : owner.pins.has(node.id) || owner.labels.has(node.id) ? 2 : node.influence);
      const room = this.visibleWidth * this.transform.k >= WIDE_ENOUGH;
      const named = [...this.present].filter((node) => first(node) >= 2
        || (room && (node.kind === "feature" || node.kind === "logit")));
      const [taken, marks] = [[], [...this.present]];
      const shown = d3.sort(named, (node) => -first(node)).flatMap((node) => {
        const [x, y] = this.at(node);
        const text = short(owner.nameOf(node), LONGEST.label);
        const wide = text.length * LETTER;
        if (x <= 0 || x >= this.visibleWidth || y <= 0 || y >= this.visibleHeight) return [];
        const right = x + this.radius(node) + 3;
        const from = [right, x - this.radius(node) - 3 - wide].find((left) => left >= 0
          && left + wide <= this.visibleWidth
          && taken.every((other) => left > other[2] || left + wide < other[0]
            || y - 7 > other[3] || y + 7 < other[1])
          && (first(node) >= 2 || marks.every((other) => {
            const [at, height] = this.at(other);
            return at < left || at > left + wide || Math.abs(height - y) > 7;
          })));
        if (from === undefined) return [];
        taken.push([from, y - 7, from + wide, y + 7]);
        return [{ node, text, x: from, y }];
      });
      this.labels.selectAll("text").data(shown, ({ node }) => node.id).join("text")
        .attr("dy", "0.32em").attr("x", ({ x }) => x).attr("y", ({ y }) => y)
        .attr("class", ({ node }) => (owner.pins.has(node.id) ? "pinned" : null))
        .text(({ text }) => text);
    }

    /** Which nodes are chosen, pinned, found by the search or in a group. */
    mark({ found, groups }) {
      const { selected, pins } = this.owner;
      this.marks.attr("aria-selected", (node) => String(node === selected))
        .classed("chosen", (node) => node === selected)
        .classed("pinned", (node) => pins.has(node.id) || groups.has(node.id))
        .classed("missed", (node) => found !== null && !found.has(node))
        .attr("aria-label", (node) => this.owner.named(node));
      if (this.transform) this.drawLabels();
      this.point(this.pointed);
    }

    // --- pointing ---

    /** The nearest node to where a finger or the pointer is; null if none is near. */
    nearest(event) {
      const [x, y] = d3.pointer(event, this.ground.node());
      const found = d3.least(this.present, (node) => {
        const [left, top] = this.at(node);
        return Math.hypot(left - x, top - y);
      });
      const [left, top] = this.at(found);
      return Math.hypot(left - x, top - y) <= NEAR ? found : null;
    }

    clicked(event) {
      const node = this.nearest(event);
      if (node) this.owner.choose(node);
    }

    hover(event) {
      const edge = event.target.closest?.(".circuit-edges path");
      if (event.target.closest?.(".node")) return;
      if (edge) this.showEdge(d3.select(edge).datum(), d3.pointer(event, this.ground.node()));
      else this.point(null);
    }

    /** Light up a node's edges and show its tooltip; without a node, those of the chosen one. */
    point(node) {
      this.pointed = node;
      const lit = node ?? this.owner.selected;
      const near = new Set(lit ? [lit] : []);
      for (const edge of lit ? [...lit.into, ...lit.out] : []) {
        if (this.shown.has(edge)) near.add(edge.source).add(edge.target);
      }
      this.svg.classed("focused", Boolean(lit));
      this.lines.classed("lit", (edge) => edge.source === lit || edge.target === lit);
      this.marks.classed("lit", (other) => near.has(other));
      if (node) this.showTip(node);
      else this.tip.hidden = true;
    }

    showTip(node) {
      const lines = [this.owner.nameOf(node), node.label, `token ${visible(node.token)}${node.gene
        ? ` of ${node.gene}` : ""}`, `${node.value_name} ${number(node.value)}`,
      `influence ${percent(node.influence)}`];
      this.tell([...new Set(lines)], this.at(node));
    }

    showEdge(edge, place) {
      this.tell([`${this.owner.nameOf(edge.source)} \u2192 ${this.owner.nameOf(edge.target)}`,
        `${edge.weight > 0 ? "adds" : "takes away"} ${number(Math.abs(edge.weight))}`,
        `weight ${percent(edge.carried)}`], place);
    }

    /** The tooltip beside a place, on the side that has room, and never on it. */
    tell(lines, [x, y]) {
      this.tip.replaceChildren(...lines.map((line) => element("div", {}, line)));
      this.tip.hidden = false;
      const left = MARGIN.left + x + 14;
      const room = this.stage.clientWidth - this.tip.offsetWidth;
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
        Home: () => this.owner.target, End: () => this.along(this.order[0], -1),
      };
      if (event.ctrlKey || event.metaKey || event.altKey) return;
      if (event.key in moves) this.go(moves[event.key]() ?? node);
      else if (event.key === "Enter" || event.key === " ") this.owner.choose(node);
      else if (event.key === "p" || event.key === "P") this.owner.pin(node);
      else if (event.key === "Escape" && this.owner.selected) this.owner.choose(null);
      else return;
      event.preventDefault();
      event.stopPropagation();
    }

    /** The next node in reading order; after the last one comes the first. */
    along(node, step) {
      const { length } = this.order;
      return this.order[(this.order.indexOf(node) + step + length) % length];
    }

    /** The nearest node of the next occupied line above or below. */
    across(node, step) {
      const there = this.order.filter((other) => Math.sign(other.y - node.y) === step);
      return d3.least(there, (a, b) => Math.abs(a.y - node.y) - Math.abs(b.y - node.y)
        || Math.abs(a.x - node.x) - Math.abs(b.x - node.x));
    }

    /** The one node that the Tab key reaches. */
    stop(node) {
      this.current = node;
      this.marks.attr("tabindex", (other) => (other === node ? 0 : -1));
    }

    /** Move the focus. */
    go(node) {
      this.stop(node);
      this.reveal(node);
      this.marks.filter((other) => other === node).node().focus({ preventScroll: true });
    }

    /** Move the view if a node is outside of it. */
    reveal(node) {
      const [x, y] = this.at(node);
      const { k } = this.transform;
      const outside = (place, end) => place < EDGE || place > end - EDGE;
      const across = outside(x, this.visibleWidth);
      const upright = outside(y, this.visibleHeight);
      if (!across && !upright) return;
      this.window.call(this.zoom.translateBy, across ? (this.visibleWidth / 2 - x) / k : 0,
        upright ? (this.visibleHeight / 2 - y) / k : 0);
    }

    scaleBy(factor) {
      this.window.call(this.zoom.scaleBy, factor);
    }
  }

  Object.assign(tools, { circuitGraph: Graph, circuitMark: mark, circuitTexts: texts });
});
