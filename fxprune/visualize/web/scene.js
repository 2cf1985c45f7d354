// The content of a picture, without positions: boxes, frames around them, edges, and their status in the shown plan.
// A state is {open: {blockId: true}, plan: index or null}. Nothing here uses a document.
var fxprune = globalThis.fxprune || (globalThis.fxprune = {});

(function (api) {
  "use strict";

  const INPUT = -1;
  const OUTPUT = -2;
  const SIGNS = { add: "+", iadd: "+", sub: "\u2212", mul: "\u00d7", cat: "cat", concat: "cat" };
  const ADVANCES = {
    // advance widths of Inter in thousandths of the font size, from the space character on
    400: [
      281, 288, 466, 633, 642, 982, 644, 300, 365, 365, 501, 662, 288, 460, 288, 360, 631, 407, 610, 618, 646, 593, 620,
      566, 619, 620, 288, 302, 662, 662, 662, 511, 966, 690, 654, 730, 722, 601, 590, 746, 743, 269, 571, 672, 565, 903,
      753, 765, 639, 765, 644, 642, 646, 744, 690, 985, 682, 679, 629, 365, 360, 365, 471, 456, 323, 562, 612, 571, 612,
      583, 370, 613, 591, 242, 242, 549, 242, 876, 591, 600, 612, 612, 376, 528, 327, 591, 562, 818, 546, 562, 552, 426,
      333, 426, 662,
    ],
    600: [
      252, 321, 523, 644, 650, 1004, 663, 326, 373, 373, 540, 673, 319, 465, 319, 379, 660, 423, 623, 636, 666, 612,
      640, 576, 640, 640, 319, 329, 673, 673, 673, 543, 999, 728, 659, 737, 722, 605, 588, 749, 746, 277, 580, 703, 565,
      922, 759, 769, 645, 773, 652, 650, 660, 736, 728, 1020, 720, 713, 652, 373, 379, 373, 481, 469, 351, 574, 624,
      583, 624, 591, 389, 625, 612, 262, 262, 569, 262, 900, 612, 609, 624, 624, 397, 549, 353, 612, 587, 839, 569, 588,
      566, 455, 359, 455, 673,
    ],
  };

  /** The width of a text in Inter; a character that is not ASCII counts as a wide one. */
  api.textWidth = function (text, size, weight) {
    let sum = 0;
    for (const sign of text) {
      const advance = ADVANCES[weight || 400][sign.codePointAt(0) - 32];
      sum += advance === undefined ? (sign === "\u00b7" ? 300 : 1000) : advance;
    }
    return (sum * size) / 1000;
  };

  /** Shorten a text in its middle to a width of at most `most`. */
  api.shorten = function (text, most, size, weight) {
    const signs = Array.from(text);
    let kept = signs.length;
    let short = text;
    while (kept > 2 && api.textWidth(short, size, weight) > most) {
      kept -= 1;
      const head = Math.floor(kept / 3);
      short = signs.slice(0, head).join("") + "\u2026" + signs.slice(signs.length - (kept - head)).join("");
    }
    return short;
  };

  api.milliseconds = (value) => String(Number(value.toPrecision(3)));

  /** The costs of a network: key in before and after, name, and function that formats it. */
  api.costs = (picture) =>
    [
      ["flops", "FLOPs", api.quantity],
      ["params", "parameters", api.quantity],
      ["blocks", "blocks", api.quantity],
      ["latency_ms", "latency (ms)", api.milliseconds],
    ].filter(([key]) => typeof picture.before[key] === "number");

  api.percent = function (share) {
    if (share > 0 && share < 0.0005) return "<0.1 %";
    return (100 * share).toFixed(1).replace(/\.0$/, "") + " %";
  };

  /** The share of the network's FLOPs as text; empty if it is not known. */
  api.shareText = function (picture, flops) {
    const known = typeof flops === "number" && picture.before.flops;
    return known ? api.percent(flops / picture.before.flops) + " FLOPs" : "";
  };

  api.quantity = function (value) {
    const steps = [
      [1e12, "T"],
      [1e9, "G"],
      [1e6, "M"],
      [1e3, "k"],
    ];
    for (const [factor, prefix] of steps) {
      if (value >= factor * 0.9995) return Number((value / factor).toPrecision(3)) + prefix;
    }
    return String(Math.round(value));
  };

  function removedRegions(picture, plan) {
    return plan === null || plan === undefined ? [] : picture.plans[plan].removed;
  }

  /** The region that removes each node, and the blocks that are removed in part or as a whole. */
  api.removal = function (picture, plan) {
    const taker = {};
    for (const index of removedRegions(picture, plan)) {
      for (const node of picture.regions[index].nodes) taker[node] = index;
    }
    const status = picture.blocks.map(function (block) {
      const gone = block.nodes.filter((node) => taker[node] !== undefined).length;
      if (!gone) return "kept";
      return gone === block.nodes.length ? "removed" : "partly";
    });
    return { taker: taker, status: status };
  };

  /** The regions inside a block that the plan removes. */
  api.removedInside = function (picture, plan, block) {
    const nodes = new Set(block.nodes);
    return removedRegions(picture, plan)
      .map((index) => picture.regions[index])
      .filter((region) => region.nodes.some((node) => nodes.has(node)));
  };

  function relative(name, prefix) {
    return prefix && name.startsWith(prefix + ".") ? name.slice(prefix.length + 1) : name;
  }

  function signOf(block) {
    const words = Array.from(new Set(block.summary.split(" \u00b7 ").map((word) => SIGNS[word] || word)));
    const few = words.length > 2 ? [words[0], "\u2026", words[words.length - 1]] : words;
    return api.shorten(few.join(" "), 130, 12, 400);
  }

  function framed(picture) {
    const count = {};
    for (const block of picture.blocks) count[block.island] = (count[block.island] || 0) + 1;
    return picture.islands.filter((island) => island.name && count[island.name] > 1).map((island) => island.name);
  }

  function noteOf(picture, block, status) {
    const region = picture.regions[block.region];
    const state = { removed: "removed", partly: "part removed" }[status] || (region ? "rank " + region.rank : "");
    return [state, api.shareText(picture, block.flops)].filter(Boolean).join(" \u00b7 ");
  }

  function blockBox(picture, block, status, frames) {
    const parent = frames.indexOf(block.island) >= 0 ? "i:" + block.island : null;
    const common = { key: "b" + block.id, block: block.id, name: block.label, status: status, parent: parent };
    if (block.glue) {
      const sign = signOf(block);
      const w = sign.length === 1 ? 26 : api.textWidth(sign, 12, 400) + 20;
      return Object.assign(common, { kind: "glue", label: sign, w: Math.max(26, w), h: 26 });
    }
    const label = api.shorten(parent ? relative(block.label, block.island) : block.label, 230, 13, 600);
    const note = noteOf(picture, block, status);
    const widest = noteOf(picture, block, "partly"); // the size of a box does not depend on the plan
    const w = Math.max(112, api.textWidth(label, 13, 600) + 26, api.textWidth(widest, 10.5, 400) + 22);
    return Object.assign(common, { kind: "block", label: label, note: note, w: w, h: 44 });
  }

  /** The common prefix of the dotted names of a block's layers. */
  function sharedPath(picture, block) {
    const paths = block.nodes.map((id) => picture.nodes[id].name.split(".").slice(0, -1)).filter((path) => path.length);
    if (!paths.length) return "";
    const differs = (part, i) => paths.some((path) => path[i] !== part);
    const at = paths[0].findIndex(differs);
    return paths[0].slice(0, at < 0 ? paths[0].length : at).join(".");
  }

  function nodeBox(picture, node, gone) {
    const block = picture.blocks[node.block];
    const short = relative(node.name, sharedPath(picture, block));
    const same = short.replace(/_\d+$/, "").toLowerCase() === node.op.toLowerCase();
    const label = api.shorten(same ? node.op : short, 120, 11.5, 600);
    const note = same ? "" : api.shorten(node.op, 130, 11, 400);
    const w = api.textWidth(label, 11.5, 600) + (note ? api.textWidth(note, 11, 400) + 7 : 0) + 20;
    return {
      key: "n" + node.id,
      kind: "node",
      block: block.id,
      node: node.id,
      name: node.name,
      label: label,
      note: note,
      status: gone ? "removed" : "kept",
      parent: "g:" + block.id,
      w: Math.max(48, w),
      h: 26,
    };
  }

  function port(key, label) {
    return {
      key: key,
      kind: "port",
      name: label,
      label: label,
      status: "kept",
      parent: null,
      w: api.textWidth(label, 12, 600) + 30,
      h: 28,
    };
  }

  function makeBoxes(picture, state, removal, frames) {
    const boxes = [];
    if (picture.block_edges.some((edge) => Number(edge[0]) === INPUT)) boxes.push(port("in", "images"));
    for (const block of picture.blocks) {
      if (!state.open[block.id]) {
        boxes.push(blockBox(picture, block, removal.status[block.id], frames));
        continue;
      }
      for (const id of block.nodes) {
        boxes.push(nodeBox(picture, picture.nodes[id], removal.taker[id] !== undefined));
      }
    }
    if (picture.block_edges.some((edge) => Number(edge[1]) === OUTPUT)) boxes.push(port("out", "outputs"));
    return boxes;
  }

  function makeFrames(picture, state, removal, frames) {
    const made = frames.map((name) => ({ key: "i:" + name, kind: "island", label: name, parent: null }));
    for (const block of picture.blocks) {
      if (!state.open[block.id]) continue;
      const inIsland = frames.indexOf(block.island) >= 0;
      made.push({
        key: "g:" + block.id,
        kind: "open",
        block: block.id,
        name: block.label,
        status: removal.status[block.id],
        label: inIsland ? relative(block.label, block.island) : block.label,
        parent: inIsland ? "i:" + block.island : null,
      });
    }
    return made;
  }

  /** All boxes, frames and edges to lay out and draw. */
  api.scene = function (picture, state) {
    const removal = api.removal(picture, state.plan);
    const frames = framed(picture);
    return {
      boxes: makeBoxes(picture, state, removal, frames),
      frames: makeFrames(picture, state, removal, frames),
      edges: api.edgesOf(picture, state, removal),
    };
  };
})(fxprune);
