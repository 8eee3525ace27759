/* Circuits to explore: choose a cell, choose, pin, name, group and find nodes, filter, zoom.

   A page holds a box of the class `circuit` (report/boxes/circuit.py). When it comes near, d3 and
   the data file of its first circuit are loaded, scripts both: a page opened from disk may load a
   script but not fetch a file. A data file calls companionCircuit(name, view). The parts are
   circuit_graph.js (the drawing) and circuit_panel.js (what stands beside it). What a reader has
   chosen is in the page's address, so that a link leads to the same picture:
   #circuit=case_study&node=...&pin=...,...&group=name~id~id&label=id~text&by=gene&q=cd14

   Texts come from strangers: they reach the page through textContent and setAttribute only. */
"use strict";
(window.companionParts ??= []).push((tools) => {
  const { element, loaded, whenNear } = tools;
  const STEPS = 100;
  const KINDS = {
    feature: "features", head: "attention heads", embedding: "embeddings",
    error: "transcoder errors", logit: "logits",
  };
  const received = new Map();
  window.companionCircuit = (name, view) => received.set(name, view);

  /** An address's part after the #, if it is about a circuit. */
  const stated = () => {
    const state = new URLSearchParams(location.hash.slice(1));
    return state.has("circuit") ? state : null;
  };

  /** One circuit in a box: its nodes and edges, and what the reader has chosen of them. */
  class Circuit {
    constructor(explorer, name, view, state) {
      Object.assign(this, { explorer, name, view, full: false, selected: null });
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
      this.full = explorer.box.classList.contains("full");
      this.read(state);
    }

    /** What an address says; what it names and this circuit does not have is left out. */
    read(state) {
      const known = (ids) => ids.filter((id) => this.nodes.has(id));
      const parts = (key) => state.getAll(key).map((text) => text.split("~"));
      this.wanted = this.nodes.get(state.get("node")) ?? null;
      this.pins = new Set(known((state.get("pin") ?? "").split(",")));
      this.groups = parts("group").map(([name, ...ids]) => ({ name, ids: known(ids) }))
        .filter(({ name, ids }) => name && ids.length);
      this.labels = new Map(parts("label").filter(([id, text]) => this.nodes.has(id) && text));
      this.by = ["gene", "term", "token"].includes(state.get("by")) ? state.get("by") : "";
      this.state = state;
    }

    start(place) {
      this.stage = element("div", { className: "circuit-stage" });
      this.status = element("p", { className: "circuit-status", role: "status" });
      const controls = this.filters();
      const viewing = this.viewing();
      this.list = new tools.circuitList(this);
      this.panel = new tools.circuitPanel(this);
      this.sub = new tools.circuitSub(this);
      this.more = element("details", { className: "circuit-filters" },
        element("summary", {}, "Filters"), controls);
      place.replaceChildren(this.more, element("div", { className: "circuit-main" },
        element("div", { className: "circuit-picture" }, this.stage, viewing, this.status,
          this.sub.element),
        element("div", { className: "circuit-side" }, this.panel.element, this.list.element)));
      this.graph = new tools.circuitGraph(this.stage, this);
      this.panel.hint();
      this.restore(this.state);
      this.more.open = ["weight", "influence", "sign", "genes", "hide"].some((key) =>
        this.state.has(key));
      this.filter();
      this.refresh();
      if (this.wanted) this.choose(this.wanted);
      let width = this.stage.clientWidth;
      this.watch = new ResizeObserver(() => {
        if (this.stage.clientWidth === width) return;
        width = this.stage.clientWidth;
        this.graph.fit();
      });
      this.watch.observe(this.stage);
    }

    // --- what the reader handles ---

    filters() {
      const range = () => element("input", { type: "range", min: 0, max: STEPS, step: 1, value: 0 });
      [this.slider, this.keep] = [range(), range()];
      [this.least, this.kept] = [element("output", {}), element("output", {})];
      this.sign = element("select", {}, new Option("both", ""),
        new Option("adds", "1"), new Option("takes away", "-1"));
      this.genesOnly = element("input", { type: "checkbox" });
      this.kinds = new Map(this.view.kinds.map((kind) =>
        [kind, element("input", { type: "checkbox", checked: true })]));
      const reset = element("button", { type: "button" }, "Reset filters");
      reset.addEventListener("click", () => {
        this.restore(new URLSearchParams());
        this.changed();
      });
      const group = element("div", {
        className: "circuit-controls", role: "group", "aria-label": "Filter the circuit",
      },
      element("label", { title: "The share of the target's contributions that an edge carries" },
        "Least weight ", this.slider, " ", this.least),
      element("label", { title: "The share of the target's contributions that passes through" },
        "Least influence ", this.keep, " ", this.kept),
      element("label", {}, "Sign ", this.sign),
      element("label", {
        title: "Nodes on tokens of genes, and what they lead to",
      }, this.genesOnly, " gene tokens only"),
      ...[...this.kinds].map(([kind, box]) => element("label", {}, box, tools.circuitMark(kind),
        KINDS[kind])), reset);
      group.addEventListener("input", () => this.changed());
      return group;
    }

    viewing() {
      this.beyond = element("span", { className: "circuit-beyond" });
      const button = (text, label, act) => {
        const made = element("button", { type: "button", title: label, "aria-label": label }, text);
        made.addEventListener("click", act);
        return made;
      };
      this.growing = button("Full screen", "Full screen", () => this.grow());
      return element("div", {
        className: "circuit-viewing", role: "group", "aria-label": "View",
      },
      button("+", "Zoom in", () => this.graph.scaleBy(1.4)),
      button("\u2212", "Zoom out", () => this.graph.scaleBy(1 / 1.4)),
      button("Whole picture", "Whole picture", () => this.graph.fit()), this.growing, this.beyond);
    }

    /** Over the whole window and back. */
    grow(full = !this.full) {
      this.full = full;
      this.explorer.box.classList.toggle("full", full);
      document.documentElement.classList.toggle("circuit-full", full);
      const said = full ? "Leave full screen" : "Full screen";
      this.growing.textContent = said;
      this.growing.title = said;
      this.growing.setAttribute("aria-label", said);
      this.graph.fit();
    }

    // --- the filters ---

    /** A step of a slider as a share; none below the first step. */
    threshold(slider, [low, high]) {
      const step = Number(slider.value);
      // The last step is the heaviest itself, whatever rounding says.
      return step === 0 ? 0 : step === STEPS ? high : low * (high / low) ** (step / STEPS);
    }

    restore(state) {
      this.slider.value = Number(state.get("weight") ?? 0) || 0;
      this.keep.value = Number(state.get("influence") ?? 0) || 0;
      this.sign.value = ["1", "-1"].includes(state.get("sign")) ? state.get("sign") : "";
      this.genesOnly.checked = state.get("genes") === "1";
      const hidden = (state.get("hide") ?? "").split(",");
      for (const [kind, box] of this.kinds) box.checked = !hidden.includes(kind);
      if (state.has("q")) this.list.search.value = state.get("q");
    }

    filter() {
      const least = this.threshold(this.slider, this.range);
      const influence = this.threshold(this.keep, [1e-3, 0.5]);
      const sign = Number(this.sign.value);
      const allowed = (node) => node === this.target
        || (this.kinds.get(node.kind).checked && node.influence >= influence);
      const passing = this.edges.filter((edge) => edge.carried >= least
        && (!sign || Math.sign(edge.weight) === sign)
        && allowed(edge.source) && allowed(edge.target));
      const shown = new Set(this.genesOnly.checked ? fromGenes(passing) : passing);
      const present = new Set([this.target, this.selected]);
      for (const id of this.pins) present.add(this.nodes.get(id));
      for (const edge of shown) present.add(edge.source).add(edge.target);
      present.delete(null);
      this.graph.show(present, shown);
      this.say(least, influence);
    }

    say(least, influence) {
      const { percent } = tools.circuitTexts;
      const { view, graph } = this;
      for (const [slider, output, value, all] of [[this.slider, this.least, least, "all edges"],
        [this.keep, this.kept, influence, "all nodes"]]) {
        output.textContent = value ? `≥ ${percent(value)}` : "all";
        slider.setAttribute("aria-valuetext", value ? `at least ${percent(value)}` : all);
      }
      const parts = [`${graph.shown.size} of ${this.edges.length} edges and ${graph.present.size} `
        + `of ${this.nodes.size} nodes shown.`];
      if (view.edges.length < view.total_edges) {
        parts.push(`The figure has the heaviest ${view.edges.length} of the circuit's `
          + `${view.total_edges} edges.`);
      }
      this.status.textContent = parts.join(" ");
    }

    /** After anything that the reader changes: filters, pins, groups, names, the search. */
    changed() {
      this.filter();
      this.refresh();
      this.write();
    }

    refresh() {
      const found = this.list.found();
      const groups = this.sub.draw();
      this.graph.mark({ found, groups });
      this.list.draw(found);
      if (this.selected) this.panel.lists();
    }

    /** Put what is chosen into the address, without a step in the history. */
    write() {
      const state = new URLSearchParams({ circuit: this.name });
      const put = (key, value) => value && state.append(key, value);
      put("node", this.selected?.id);
      put("pin", [...this.pins].join(","));
      for (const { name, ids } of this.groups) put("group", [name.replaceAll("~", "-"), ...ids]
        .join("~"));
      for (const [id, text] of this.labels) put("label", `${id}~${text.replaceAll("~", "-")}`);
      put("by", this.by);
      put("q", this.list.search.value.trim());
      put("weight", Number(this.slider.value) && this.slider.value);
      put("influence", Number(this.keep.value) && this.keep.value);
      put("sign", this.sign.value);
      put("genes", this.genesOnly.checked && "1");
      put("hide", [...this.kinds].filter(([, box]) => !box.checked).map(([kind]) => kind).join(","));
      this.written = `#${state}`;
      history.replaceState(null, "", this.written);
    }

    // --- what nodes are called ---

    nameOf(node) {
      return this.labels.get(node.id) ?? node.name;
    }

    /** What a node is, in one line. */
    named(node) {
      const { visible } = tools.circuitTexts;
      const gene = node.gene ? ` of ${node.gene}` : "";
      const own = this.labels.has(node.id) ? `${this.labels.get(node.id)}: ` : "";
      const what = node === this.target ? `${node.label} (the target)` : node.label;
      const pinned = this.pins.has(node.id) ? ", pinned" : "";
      return `${own}${what}, token ${visible(node.token)}${gene}${pinned}`;
    }

    briefly(node) {
      const own = this.labels.has(node.id) ? `${this.labels.get(node.id)}: ` : "";
      return `${own}${node.label}, at ${tools.circuitTexts.visible(node.token)}${
        node.gene && node.gene !== node.token.trim() ? ` (${node.gene})` : ""}`;
    }

    rename(node, text) {
      if (text.trim()) this.labels.set(node.id, text.trim());
      else this.labels.delete(node.id);
      this.refresh();
      this.write();
    }

    // --- choosing and pinning ---

    choose(node) {
      this.selected = node;
      if (node) this.graph.stop(node);
      if (node && !this.graph.present.has(node)) this.filter();
      if (node) this.panel.show(node);
      else this.panel.hint();
      if (!node) this.panel.connections.replaceChildren();
      this.refresh();
      this.graph.point(null);
      if (node) this.graph.reveal(node);
      this.write();
    }

    close() {
      const last = this.selected;
      this.choose(null);
      this.graph.go(this.graph.present.has(last) ? last : this.target);
    }

    pin(node) {
      if (!this.pins.delete(node.id)) this.pins.add(node.id);
      this.refresh();
      this.write();
    }

    clear() {
      this.pins.clear();
      Object.assign(this, { groups: [], by: "" });
      this.changed();
    }
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

  /** A box of one or several circuits; if loading fails, the links to their files stay. */
  class Explorer {
    constructor(box) {
      this.box = box;
      this.choices = JSON.parse(box.dataset.choices);
      this.list = element("select", {}, ...this.choices.map(([name, title]) =>
        new Option(title, name)));
      this.list.addEventListener("change", () => this.open(this.list.value,
        new URLSearchParams(), true));
      this.about = element("p", { className: "circuit-about" });
      this.place = element("div", {});
      box.addEventListener("keydown", (event) => {
        if (event.key === "Escape" && this.circuit?.full) this.circuit.grow(false);
      });
    }

    async start() {
      await loaded(this.box.dataset.library);
      this.box.querySelector(".circuit-fallback")?.remove();
      const head = element("div", { className: "circuit-choice", hidden: this.choices.length < 2 },
        element("label", {}, "Circuit ", this.list));
      this.box.querySelector(".table-note").before(head, this.about, this.place);
      window.addEventListener("hashchange", () => {
        const state = stated();
        if (state && location.hash !== this.circuit.written && this.has(state)) this.follow(state);
      });
      const state = stated();
      await this.follow(state && this.has(state) ? state : new URLSearchParams());
    }

    has(state) {
      return this.choices.some(([name]) => name === state.get("circuit"));
    }

    follow(state) {
      return this.open(state.get("circuit") ?? this.choices[0][0], state, false);
    }

    async open(name, state, write) {
      const [, title, source] = this.choices.find(([known]) => known === name);
      this.list.value = name;
      this.asked = name;
      try {
        await loaded(source);
      } catch {
        this.place.replaceChildren(`The circuit ${title} could not be loaded.`);
        return;
      }
      if (this.asked !== name) return;
      const view = received.get(name);
      this.about.textContent = view.about ?? "";
      for (const link of this.box.querySelectorAll("[data-file]")) {
        link.href = `downloads/circuits/${name}.${link.dataset.file}`;
        link.textContent = `${name}.${link.dataset.file}`;
      }
      this.circuit?.watch.disconnect();
      this.circuit = new Circuit(this, name, view, state);
      this.circuit.start(this.place);
      if (write) this.circuit.write();
    }
  }

  whenNear(".circuit[data-choices]", async (box) => {
    try {
      await new Explorer(box).start();
    } catch (error) {
      console.error(error);
      box.querySelector(".table-note").append("; the figure could not be loaded");
    }
  });
});
