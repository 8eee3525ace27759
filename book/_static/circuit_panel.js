/* What stands beside a circuit's drawing (circuit.js): the list of its nodes, the chosen node, and
   the picture of pinned nodes and groups. All texts come from strangers and are set as text. */
"use strict";
(window.companionParts ??= []).push((tools) => {
  const { element } = tools;
  const MOST_LISTED = 150;
  const MOST_GROUPS = 12;
  const SVG = "http://www.w3.org/2000/svg";
  const button = (text, act, properties = {}) => {
    const made = element("button", { type: "button", ...properties }, text);
    made.addEventListener("click", act);
    return made;
  };
  const says = (name) => tools.circuitTexts[name];

  // --- the nodes as a list ---

  /** All visible nodes, the most influential first, with a search over all that is known. */
  class NodeList {
    constructor(owner) {
      this.owner = owner;
      this.search = element("input", { type: "search", autocomplete: "off", spellcheck: false,
        title: "Nodes that hold every word: name, token, gene, term" });
      this.search.addEventListener("input", () => owner.changed());
      this.search.addEventListener("keydown", (event) => {
        if (event.key === "Enter") this.list.querySelector("button")?.click();
      });
      this.count = element("p", { className: "circuit-status", role: "status" });
      this.list = element("ol", {});
      this.element = element("section", { className: "circuit-list", "aria-label": "Nodes" },
        element("label", {}, "Find a node ", this.search), this.count, this.list);
      this.texts = new Map([...owner.nodes.values()].map((node) => [node, [node.id, node.label,
        node.name, node.token, node.gene, node.term, ...node.tokens, ...node.genes]
        .join("\n").toLowerCase()]));
    }

    /** The nodes that hold every word that is looked for; null if none is. */
    found() {
      const words = this.search.value.toLowerCase().split(/\s+/).filter(Boolean);
      if (!words.length) return null;
      return new Set([...this.owner.nodes.values()].filter((node) => words.every((word) =>
        this.texts.get(node).includes(word)
          || this.owner.labels.get(node.id)?.toLowerCase().includes(word))));
    }

    draw(found) {
      const { owner } = this;
      const there = [...owner.graph.present].filter((node) => found?.has(node) ?? true)
        .sort((a, b) => b.influence - a.influence);
      this.count.textContent = found === null ? "The most influential first."
        : `${there.length} of ${owner.graph.present.size} visible nodes found.`;
      this.list.replaceChildren(...there.slice(0, MOST_LISTED).map((node) => {
        const made = button("", () => owner.choose(node),
          { "aria-current": String(node === owner.selected) });
        made.append(tools.circuitMark(node.kind), element("span", {}, owner.briefly(node)),
          element("span", { className: "carried" }, says("percent")(node.influence)));
        const pinned = owner.pins.has(node.id);
        return element("li", {}, made, button(pinned ? "★" : "☆", () => owner.pin(node),
          { "aria-pressed": String(pinned), "aria-label": `Pin ${owner.nameOf(node)}` }));
      }));
    }
  }

  // --- the chosen node ---

  class NodePanel {
    constructor(owner) {
      this.owner = owner;
      // The live region stays and its content changes, else nothing would be announced.
      this.about = element("div", { "aria-live": "polite" });
      this.more = element("div", {});
      this.connections = element("div", { className: "circuit-connections" });
      this.pinning = button("Pin", () => owner.pin(owner.selected));
      this.closing = button("Close", () => owner.close());
      this.buttons = element("div", { className: "circuit-buttons" }, this.pinning, this.closing);
      this.element = element("section", { className: "circuit-panel", "aria-label": "Chosen node" },
        this.about, this.buttons, this.more, this.connections);
    }

    hint() {
      this.connections.replaceChildren();
      this.more.replaceChildren();
      this.buttons.hidden = true;
      this.about.replaceChildren(element("p", { className: "circuit-hint" },
        "Choose a node by a click, or with the arrow keys and Enter, to see what it fires on and "
        + "its edges. Lines are wider the more of the target's contributions they carry (their "
        + "weight); solid lines add, dashed lines take away. A star or the key P pins a node. Drag "
        + "to move; Ctrl and the wheel, two fingers or the buttons zoom."));
    }

    show(node) {
      const { owner } = this;
      this.title = element("h3", { tabIndex: -1 }, node === owner.target
        ? `${node.label} (the target)` : node.label);
      this.about.replaceChildren(this.title, this.facts(node));
      this.more.replaceChildren(this.naming(node), ...[this.contexts(node), this.types(node)]
        .filter(Boolean));
      this.buttons.hidden = false;
    }

    facts(node) {
      const { number, percent, visible } = tools.circuitTexts;
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

    /** A field for a name of one's own, kept in the address. */
    naming(node) {
      const field = element("input", { type: "text", autocomplete: "off", maxLength: 60,
        value: this.owner.labels.get(node.id) ?? "", placeholder: node.name });
      field.addEventListener("input", () => this.owner.rename(node, field.value));
      return element("p", {}, element("label", {}, "Your name for it ", field));
    }

    contexts(node) {
      return node.contexts?.length && element("div", {}, element("h4", {}, "Strongest contexts"),
        tools.heat(node.contexts));
    }

    types(node) {
      return node.types?.length && element("div", {}, element("h4", {}, "Active, by cell type"),
        tools.bars(node.types), this.owner.view.types_note && element("p",
          { className: "circuit-hint" }, this.owner.view.types_note));
    }

    /** Both lists of edges, the heaviest first; what the filters hide is counted. */
    lists() {
      const node = this.owner.selected;
      this.pinning.textContent = this.owner.pins.has(node.id) ? "Unpin" : "Pin";
      this.connections.replaceChildren(
        this.list("Receives from", node.into, (edge) => edge.source),
        this.list("Contributes to", node.out, (edge) => edge.target),
        element("p", { className: "circuit-hint" }, "Before each node the contribution, in units "
          + "of the value it is part of; after it the weight, the share of the target's "
          + "contributions that the edge carries."));
    }

    list(title, edges, other) {
      const { percent, number } = tools.circuitTexts;
      const shown = edges.filter((edge) => this.owner.graph.shown.has(edge))
        .sort((a, b) => Math.abs(b.weight) - Math.abs(a.weight));
      const count = shown.length < edges.length ? `${shown.length} of ${edges.length}`
        : String(edges.length);
      const items = shown.map((edge) => {
        const made = button("", () => {
          this.owner.choose(other(edge));
          this.title.focus();
        });
        made.append(element("span", { className: edge.weight > 0 ? "adds" : "takes" },
          (edge.weight > 0 ? "+" : "") + number(edge.weight)),
        element("span", {}, this.owner.briefly(other(edge))),
        element("span", { className: "carried" }, percent(edge.carried)));
        return element("li", {}, made);
      });
      return element("div", {}, element("h4", {}, `${title} (${count})`),
        items.length ? element("ol", {}, ...items) : element("p", {}, "none"));
    }
  }

  // --- pinned nodes and groups ---

  const RULES = { gene: (node) => node.gene, term: (node) => node.term_name,
    token: (node) => (node.kind === "feature" ? node.tokens[0] : "") };

  /** Groups by a rule: what a node has in common with others, the most influential first. */
  function groupsBy(rule, nodes, target) {
    const said = d3.group([...nodes].filter((node) => node !== target && RULES[rule](node)),
      RULES[rule]);
    const weight = (members) => d3.sum(members, (node) => node.influence);
    return d3.sort(said, ([, members]) => -weight(members)).slice(0, MOST_GROUPS)
      .map(([name, members]) => ({ name, ids: members.map((node) => node.id) }));
  }

  /** What flows between the boxes: shares of the target's contributions along all paths that touch
      no other box, with the sign of their sum. */
  function flows(owner, boxes) {
    const boxOf = new Map(boxes.flatMap((box) => box.members.map((node) => [node, box])));
    const found = new Map();
    const height = (node) => (node.kind === "logit" ? Infinity : node.row);
    for (const box of boxes) {
      // From the box's own influence downwards; a node passes on what it was given.
      const held = new Map(box.members.map((node) => [node, [node.influence, node.influence]]));
      const open = [...box.members].sort((a, b) => height(a) - height(b));
      while (open.length) {
        const node = open.pop();
        const [plain, signed] = held.get(node);
        for (const edge of node.into) {
          const other = boxOf.get(edge.source);
          if (other === box) continue;
          const part = [plain * edge.share, signed * edge.share * Math.sign(edge.weight)];
          if (other) {
            const key = `${boxes.indexOf(other)} ${boxes.indexOf(box)}`;
            const sum = found.get(key) ?? { from: other, to: box, plain: 0, signed: 0 };
            found.set(key, sum);
            sum.plain += part[0];
            sum.signed += part[1];
          } else {
            if (!held.has(edge.source)) {
              held.set(edge.source, [0, 0]);
              open.push(edge.source);
              open.sort((a, b) => height(a) - height(b));
            }
            held.set(edge.source, held.get(edge.source).map((value, i) => value + part[i]));
          }
        }
      }
    }
    return [...found.values()];
  }

  class Subgraph {
    constructor(owner) {
      this.owner = owner;
      this.rule = element("select", {}, new Option("nothing", ""), new Option("gene", "gene"),
        new Option("best term", "term"), new Option("main token", "token"));
      this.rule.addEventListener("input", () => {
        owner.by = this.rule.value;
        owner.changed();
      });
      this.name = element("input", { type: "text", autocomplete: "off", maxLength: 60 });
      this.name.addEventListener("keydown", (event) => event.key === "Enter" && this.group());
      this.forming = element("span", { className: "circuit-forming" },
        element("label", {}, "Name ", this.name),
        button("Group the pinned nodes", () => this.group()));
      this.picture = element("div", { className: "circuit-boxes" });
      this.hint = element("p", { className: "circuit-hint" }, "Pin nodes, or group them, and this "
        + "is the short version: each box a node or a group, each line the part of the target's "
        + "contributions that runs from one to the other outside of the other boxes.");
      this.element = element("section", { className: "circuit-sub",
        "aria-label": "Pinned nodes and groups" },
      element("div", { className: "circuit-controls" },
        element("strong", {}, "Pinned nodes and groups"),
        element("label", {}, "Group by ", this.rule), this.forming,
        button("Clear", () => owner.clear())), this.hint, this.picture);
      new ResizeObserver(() => this.lines()).observe(this.picture);
    }

    /** The pinned nodes as a group with a name of the reader's. */
    group() {
      const { owner } = this;
      const ids = [...owner.pins].filter((id) => id !== owner.target.id);
      if (!ids.length) return;
      const name = this.name.value.trim() || ids.slice(0, 2).map((id) =>
        owner.nameOf(owner.nodes.get(id))).join(", ");
      owner.groups = [...owner.groups.map((group) => ({ ...group,
        ids: group.ids.filter((id) => !owner.pins.has(id)) })).filter(({ ids: left }) =>
        left.length), { name, ids }];
      owner.pins.clear();
      this.name.value = "";
      owner.changed();
    }

    /** Groups of the rule and of the reader; a node is in the first that has it. */
    grouped() {
      const { owner } = this;
      const taken = new Set();
      const own = owner.by ? groupsBy(owner.by, owner.graph.present, owner.target) : [];
      return [...owner.groups.map((group) => ({ ...group, own: true })), ...own].map((group) => {
        const ids = group.ids.filter((id) => !taken.has(id) && owner.nodes.has(id));
        ids.forEach((id) => taken.add(id));
        return { ...group, ids };
      }).filter(({ ids }) => ids.length);
    }

    draw() {
      const { owner } = this;
      const groups = this.grouped();
      const grouped = new Set(groups.flatMap(({ ids }) => ids));
      const pinned = [...owner.pins].filter((id) => !grouped.has(id));
      const boxes = [...groups.map((group) => ({ ...group,
        members: group.ids.map((id) => owner.nodes.get(id)) })),
      ...pinned.map((id) => ({ members: [owner.nodes.get(id)] }))];
      if (boxes.length && !boxes.some(({ members }) => members.includes(owner.target))) {
        boxes.push({ members: [owner.target] });
      }
      this.rule.value = owner.by;
      this.forming.hidden = !owner.pins.size;
      this.hint.hidden = boxes.length > 0;
      this.boxes = boxes;
      this.flows = flows(owner, boxes);
      const rows = d3.group(boxes, (box) => d3.greatest(box.members, (node) =>
        node.influence).row);
      this.picture.replaceChildren(document.createElementNS(SVG, "svg"),
        ...d3.sort(rows, ([row]) => -row).map(([row, inRow]) => element("div", {},
          element("span", { className: "circuit-hint" }, owner.view.rows[row]),
          ...d3.sort(inRow, (box) => d3.mean(box.members, (node) => node.x ?? 0))
            .map((box) => this.box(box)))));
      this.lines();
      return grouped;
    }

    box(box) {
      const { owner } = this;
      const [node] = box.members;
      const { percent, short } = tools.circuitTexts;
      const name = box.name ?? owner.nameOf(node);
      const count = box.members.length > 1 ? ` (${box.members.length})` : "";
      const share = Math.min(1, d3.sum(box.members, (one) => one.influence));
      const given = d3.sort(this.flows.filter(({ to }) => to === box), ({ plain }) => -plain)
        .slice(0, 5).map(({ from, plain, signed }) => `${from.name
          ?? owner.nameOf(from.members[0])} ${signed < 0 ? "takes away" : "adds"} ${
          percent(plain)}`);
      const made = button(short(name, 34) + count, () => owner.choose(box.members[0]), {
        className: `node-box ${node.kind}`,
        title: [name, ...box.members.slice(0, 12).map((one) => owner.briefly(one))].join("\n"),
        "aria-label": `${name}${count}, influence ${percent(share)}${
          given.length ? `; ${given.join("; ")}` : ""}` });
      made.append(element("small", {}, ` ${percent(share)}`));
      box.element = element("span", { className: "circuit-box" }, made, (box.own || !box.name)
        && node !== owner.target ? button("×", () => this.remove(box),
          { "aria-label": `Remove ${name}` }) : "");
      return box.element;
    }

    remove(box) {
      const { owner } = this;
      if (box.own) owner.groups = owner.groups.filter(({ name }) => name !== box.name);
      else owner.pins.delete(box.members[0].id);
      owner.changed();
    }

    /** Lines between the boxes, where the page has put them. */
    lines() {
      const canvas = this.picture.querySelector("svg");
      if (!canvas) return;
      const around = this.picture.getBoundingClientRect();
      canvas.setAttribute("width", around.width);
      canvas.setAttribute("height", around.height);
      canvas.setAttribute("aria-hidden", "true");
      const most = Math.max(...this.flows.map(({ plain }) => plain), 1e-9);
      canvas.replaceChildren(...d3.sort(this.flows, ({ plain }) => plain).map((flow) => {
        const [a, b] = [flow.from, flow.to].map(({ element: one }) => one.getBoundingClientRect());
        const path = document.createElementNS(SVG, "path");
        path.setAttribute("d", d3.linkVertical()({
          source: [(a.left + a.right) / 2 - around.left, a.top - around.top],
          target: [(b.left + b.right) / 2 - around.left, b.bottom - around.top] }));
        path.setAttribute("class", flow.signed < 0 ? "takes" : "adds");
        path.setAttribute("stroke-width", 0.6 + 6 * Math.sqrt(flow.plain / most));
        return path;
      }));
    }
  }

  Object.assign(tools, { circuitList: NodeList, circuitPanel: NodePanel, circuitSub: Subgraph });
});
