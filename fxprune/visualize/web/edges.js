// The edges between boxes, before and after the removal of regions. Styles: "plain" is unchanged, "ghost" is removed,
// "wire" leads past a removed region.
(function (api) {
  "use strict";

  const RANKS = { ghost: 0, plain: 1, wire: 2 };

  function Edges(picture, state, removal) {
    const found = {};
    const regions = picture.regions;
    const blockOf = (node) => (node < 0 ? node : picture.nodes[node].block);
    const pair = (edge) => blockOf(edge[0]) + ">" + blockOf(edge[1]);
    const traced = new Set(picture.edges.map(pair));
    const eager = picture.block_edges.map((edge) => edge.map(Number)).filter(([a, b]) => !traced.has(a + ">" + b));
    const inside = picture.edges.filter((edge) => blockOf(edge[0]) === blockOf(edge[1]));
    const read = new Set(inside.map((edge) => edge[0]));
    const fed = new Set(inside.map((edge) => edge[1]));

    /** The box that shows a node: its block, or its own box if the block is unfolded. */
    function shown(node) {
      if (node < 0) return node === -1 ? "in" : "out";
      return state.open[blockOf(node)] ? "n" + node : "b" + blockOf(node);
    }

    /** The status of the one folded block that contains a removed region ("removed" or "partly"), else "open". */
    function look(index) {
      const keys = new Set(regions[index].nodes.map(shown));
      const block = blockOf(regions[index].exit);
      return keys.size === 1 && !state.open[block] ? removal.status[block] : "open";
    }

    function add(from, to, style) {
      if (from === to) return;
      const key = from + ">" + to;
      if (!found[key] || RANKS[found[key].style] < RANKS[style]) found[key] = { from: from, to: to, style: style };
    }

    /** The nodes of a region's stand-in; if it has none, the nodes whose values its island reads. */
    function standIns(index) {
      const { nodes, stand_in: one } = regions[index];
      if (one !== null && one !== undefined) return [one];
      const home = picture.nodes[nodes[0]].island;
      const foreign = (node) => node < 0 || picture.nodes[node].island !== home;
      return picture.edges.filter(([from, to]) => nodes.indexOf(to) >= 0 && foreign(from)).map((edge) => edge[0]);
    }

    /** Whether a removed region is shown as one box that reads its stand-in; the wire is then drawn through the box. */
    function isThrough(index) {
      if (look(index) !== "removed") return false;
      const own = standIns(index);
      return (
        !own.length ||
        picture.edges.some(([from, to]) => own.indexOf(from) >= 0 && regions[index].nodes.indexOf(to) >= 0)
      );
    }

    /** The boxes whose values are read instead of `node` after the removal. */
    function sources(node) {
      const index = removal.taker[node];
      if (index === undefined || look(index) === "partly" || isThrough(index)) return [shown(node)];
      return [].concat(...standIns(index).map(sources));
    }

    /** Ends of an edge from or to eager code: the block itself, or its nodes that are not in `used`. */
    function ends(block, used) {
      if (block < 0) return [{ key: block === -1 ? "in" : "out" }];
      if (!state.open[block]) return [{ key: "b" + block }];
      return picture.blocks[block].nodes
        .filter((node) => !used.has(node))
        .map((node) => ({ key: "n" + node, node: node }));
    }

    /** The style of an edge from a removed region (without `from`), or from the node `from` into one. */
    function styleAt(index, from) {
      if (look(index) === "partly") return "plain";
      return isThrough(index) && (from === undefined || standIns(index).indexOf(from) >= 0) ? "wire" : "ghost";
    }

    function trace(edge) {
      const [from, to] = edge;
      const [a, b] = [removal.taker[from], removal.taker[to]];
      if (a !== undefined && a === b) return add(shown(from), shown(to), "ghost");
      const out = a === undefined ? "plain" : styleAt(a);
      const into = b === undefined ? "plain" : styleAt(b, from);
      const ghost = out === "ghost" || into === "ghost";
      add(shown(from), shown(to), ghost ? "ghost" : RANKS[out] > RANKS[into] ? out : into);
      if (a !== undefined && into !== "ghost" && regions[a].exit === from) detour(a, shown(to));
      return undefined;
    }

    /** The wires to a reader of a removed region, if they do not lead through a folded block. */
    function detour(index, to) {
      if (look(index) === "partly" || isThrough(index)) return;
      for (const node of standIns(index)) sources(node).forEach((from) => add(from, to, "wire"));
    }

    function isWire(block) {
      const index = block < 0 || state.open[block] ? null : picture.blocks[block].region;
      return index !== null && removal.status[block] === "removed" && isThrough(index);
    }

    function connect(edge) {
      const style = isWire(edge[0]) || isWire(edge[1]) ? "wire" : "plain";
      for (const a of ends(edge[0], read)) {
        for (const b of ends(edge[1], fed)) {
          const gone = [a.node, b.node].some((node) => removal.taker[node] !== undefined);
          add(a.key, b.key, gone ? "ghost" : style);
          if (removal.taker[a.node] !== undefined && removal.taker[b.node] === undefined)
            detour(removal.taker[a.node], b.key);
        }
      }
    }

    this.all = function () {
      picture.edges.forEach(trace);
      eager.forEach(connect);
      return Object.values(found);
    };
  }

  /** The edges between the visible boxes. */
  api.edgesOf = (picture, state, removal) => new Edges(picture, state, removal).all();
})(fxprune);
