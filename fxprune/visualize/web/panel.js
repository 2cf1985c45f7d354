// The text beside the picture: details of a box, the budget, the table of blocks. Text is never inserted as markup.
(function (api) {
  "use strict";

  /** Make an element with attributes and children; a string becomes a text node. */
  function make(name, attributes, children) {
    const element = document.createElement(name);
    for (const [key, value] of Object.entries(attributes || {})) {
      if (value !== null && value !== undefined) element.setAttribute(key, value);
    }
    for (const child of children || []) element.append(child);
    return element;
  }

  function number(value) {
    return typeof value === "number" ? api.quantity(value) : null;
  }

  function shapeText(shape) {
    return Array.isArray(shape) ? shape.join(" \u00d7 ") : shape || null;
  }

  function flopsText(picture, flops) {
    if (typeof flops !== "number") return null;
    const share = picture.before.flops ? ` (${api.percent(flops / picture.before.flops)})` : "";
    return api.quantity(flops) + share;
  }

  function latencyText(thing) {
    return typeof thing.latency_ms === "number" ? `${api.milliseconds(thing.latency_ms)} ms` : null;
  }

  function listOf(rows) {
    const list = make("dl");
    for (const [name, value] of rows) {
      if (value !== null && value !== undefined && value !== "")
        list.append(make("dt", {}, [name]), make("dd", {}, [String(value)]));
    }
    return list;
  }

  const KINDS = {
    bypass: "bypass: its readers read the stand-in",
    drop: "drop: this branch of an addition is removed",
  };

  function regionRows(picture, region) {
    if (!region) return [];
    return [
      ["importance", `rank ${region.rank} of ${picture.regions.length}, score ${api.score(region.score)}`],
      ["removal", KINDS[region.kind]],
      ["FLOPs", flopsText(picture, region.flops)],
      ["parameters", number(region.params)],
      ["latency", latencyText(region)],
    ];
  }

  const STATUS = { removed: "removed", partly: "removed in part" };

  function stateLine(picture, state, block, status) {
    if (status === "kept") return [];
    const names = api.removedInside(picture, state.plan, block).map((region) => region.name);
    return [make("p", { class: "gone" }, [STATUS[status] + (status === "partly" ? ": " + names.join(", ") : "")])];
  }

  function blockDetails(picture, state, box) {
    const block = picture.blocks[box.block];
    const region = picture.regions[block.region];
    const [first, last] = [block.nodes[0], block.nodes[block.nodes.length - 1]].map((id) => picture.nodes[id]);
    const own = region
      ? regionRows(picture, region)
      : [
          ["FLOPs", flopsText(picture, block.flops)],
          ["parameters", number(block.params)],
        ];
    const rows = own.concat([
      ["output", shapeText(last && last.shape)],
      ["made of", block.summary],
      ["layers", region ? region.layers.join(", ") : ""],
      ["nodes", `${block.nodes.length}, ${first.name} to ${last.name}`],
      ["part of", block.island],
    ]);
    const why = !region && block.reason ? [make("p", { class: "soft" }, [`Cannot be removed: ${block.reason}.`])] : [];
    return [
      make("h3", {}, [block.label]),
      ...stateLine(picture, state, block, box.status),
      ...why,
      listOf(rows),
      ...innerRegions(picture, state, block),
    ];
  }

  /** The candidates inside a block. */
  function innerRegions(picture, state, block) {
    const nodes = new Set(block.nodes);
    const gone = new Set(state.plan === null ? [] : picture.plans[state.plan].removed);
    const inner = picture.regions
      .map((region, index) => [region, index])
      .filter(
        ([region, index]) =>
          index !== block.region && region.nodes.length && region.nodes.every((node) => nodes.has(node)),
      );
    if (!inner.length) return [];
    const items = inner.map(([region, index]) =>
      make("li", {}, [`${region.name}, rank ${region.rank}${gone.has(index) ? ", removed" : ""}`]),
    );
    return [make("p", { class: "soft" }, ["Candidates inside:"]), make("ul", {}, items)];
  }

  function nodeDetails(picture, state, box) {
    const node = picture.nodes[box.node];
    const regions = picture.regions.filter((region) => region.nodes.indexOf(node.id) >= 0).map((region) => region.name);
    const gone = box.status === "removed" ? [make("p", { class: "gone" }, ["removed"])] : [];
    const rows = [
      ["operation", node.op],
      ["output", shapeText(node.shape)],
      ["FLOPs", flopsText(picture, node.flops)],
      ["gradient \u00d7 activation", typeof node.grad_act === "number" ? api.score(node.grad_act) : null],
      ["block", picture.blocks[node.block].label],
      ["candidates", regions.join(", ")],
    ];
    return [make("h3", {}, [node.name]), ...gone, listOf(rows)];
  }

  api.details = function (picture, state, box) {
    if (box.kind === "port") return [make("h3", {}, [box.label])];
    return box.kind === "node" ? nodeDetails(picture, state, box) : blockDetails(picture, state, box);
  };

  /** Rows of the table of costs before and after. */
  api.changeRows = function (picture, index) {
    const after = index === null ? picture.before : picture.plans[index].after;
    const head = make(
      "tr",
      {},
      ["", "before", "after", ""].map((word) => make("th", { scope: "col", class: "number" }, [word])),
    );
    const rows = api.costs(picture).map(function ([key, name, write]) {
      const [from, to] = [picture.before[key], after[key]];
      const saved = from && to !== from ? (to > from ? "+" : "\u2212") + api.percent(Math.abs(1 - to / from)) : "";
      return make("tr", {}, [
        make("th", { scope: "row" }, [name]),
        ...[write(from), write(to), saved].map((word) => make("td", { class: "number" }, [word])),
      ]);
    });
    return [head, ...rows];
  };

  api.budgetText = function (picture, index) {
    if (index === null) return "Nothing removed";
    const plan = picture.plans[index];
    const count = plan.removed.length === 1 ? "1 region" : `${plan.removed.length} regions`;
    return `${api.percent(plan.budget)} of ${api.costName(picture)}: ${count} removed`;
  };

  /** The input that selects a plan: a slider, or a switch if there is only one plan. */
  api.budgetInput = function (picture, index) {
    const one = picture.plans.length === 1;
    const kind = one
      ? { type: "checkbox", role: "switch" }
      : { type: "range", min: 0, max: picture.plans.length, step: 1 };
    const input = make("input", Object.assign({ id: "plan" }, kind, one ? {} : { "aria-labelledby": "budget-name" }));
    if (one) input.checked = index !== null;
    else input.value = index === null ? 0 : index + 1;
    const words = ` after removing ${one ? api.percent(picture.plans[0].budget) : ""} of ${api.costName(picture)}`;
    return { input: input, shown: one ? make("label", {}, [input, words]) : input };
  };

  /** The regions that a plan removes, each with a link to its block. */
  api.removedItems = function (picture, index) {
    const gone = index === null ? [] : picture.plans[index].removed.map((one) => picture.regions[one]);
    return gone
      .sort((a, b) => a.rank - b.rank)
      .map(function (region) {
        const block = picture.nodes[region.nodes[0]].block;
        return make("li", {}, [make("button", { type: "button", class: "link", "data-block": block }, [region.name])]);
      });
  };

  function tableRow(picture, state, block, status) {
    const region = picture.regions[block.region];
    const name = make("button", { type: "button", class: "link", "data-block": block.id }, [block.label]);
    const word = { kept: "kept", removed: "removed", partly: "removed in part" }[status];
    const cells = [
      block.summary,
      region ? String(region.rank) : "",
      region ? api.score(region.score) : "",
      number(block.flops) || "",
      number(region ? region.params : block.params) || "",
      word,
      region ? "" : block.reason || "",
    ];
    return make("tr", { class: status }, [
      make("td", {}, [name]),
      ...cells.map((cell, i) => make("td", i > 0 && i < 5 ? { class: "number" } : {}, [cell])),
    ]);
  }

  /** A table of all blocks with layers. */
  api.table = function (picture, state) {
    const { status } = api.removal(picture, state.plan);
    const heads = ["block", "made of", "rank", "score", "FLOPs", "parameters", "now", "why it cannot be removed"];
    const head = make(
      "tr",
      {},
      heads.map((word, i) => make("th", { scope: "col", class: i > 1 && i < 6 ? "number" : "" }, [word])),
    );
    const rows = picture.blocks
      .filter((block) => !block.glue)
      .map((block) => tableRow(picture, state, block, status[block.id]));
    return make("table", {}, [
      make("caption", { class: "unseen" }, ["Blocks from input to output"]),
      make("thead", {}, [head]),
      make("tbody", {}, rows),
    ]);
  };

  /** A value as text; a pair of numbers as "before -> after". */
  function told(value) {
    if (typeof value !== "object" || value === null) return value;
    return Object.values(value)
      .map((one) => (one === null ? "?" : Number(one).toPrecision(3)))
      .join(" \u2192 ");
  }

  api.settingsText = function (picture) {
    const words = [];
    for (const [name, value] of Object.entries(picture.settings)) {
      if (value === null || value === undefined) continue;
      const nested = typeof value === "object" && !Array.isArray(value);
      words.push(
        nested
          ? Object.entries(value)
              .map(([key, one]) => `${key} ${told(one)}`)
              .join(", ")
          : `${name} ${value}`,
      );
    }
    return words.join(" \u00b7 ");
  };

  api.make = make;
})(fxprune);
