// Movement between boxes with the keyboard, and the match of a search.
(function (api) {
  "use strict";

  const FIRST = { wire: 0, plain: 1, ghost: 2 };

  /** The box at the other end of an edge of a box, or of an edge that leaves a frame. */
  function along(picture, plan, key, mine, other) {
    const inside = key.charAt(0) === "g" ? picture.blocks[key.slice(2)].nodes.map((node) => "n" + node) : [key];
    const edges = plan.edges.filter((edge) => inside.indexOf(edge[mine]) >= 0 && inside.indexOf(edge[other]) < 0);
    edges.sort((a, b) => FIRST[a.style] - FIRST[b.style]);
    return edges.length ? edges[0][other] : null;
  }

  /** The nearest box on one side, in about the same row. */
  function beside(plan, key, step) {
    const box = plan.boxes.find((one) => one.key === key);
    if (!box) return null;
    const ahead = (other) => (other.x - box.x) * step;
    const off = (other) => Math.abs(other.row - box.row);
    const near = plan.boxes.filter((other) => other.column === box.column && ahead(other) > 1 && off(other) < 120);
    near.sort((a, b) => ahead(a) + 3 * off(a) - ahead(b) - 3 * off(b));
    return near.length ? near[0].key : null;
  }

  /** The target of an arrow key: down and up follow the edges, left and right go to the box beside. */
  api.neighbour = function (picture, plan, key, arrow) {
    if (arrow === "ArrowDown") return along(picture, plan, key, "from", "to");
    if (arrow === "ArrowUp") return along(picture, plan, key, "to", "from");
    return beside(plan, key, arrow === "ArrowRight" ? 1 : -1);
  };

  /** Whether the name of a box, or of a node in a folded block, contains the query. */
  api.matches = function (picture, box, query) {
    if (box.kind === "port") return false;
    const inside = box.kind === "node" ? [] : picture.blocks[box.block].nodes.map((id) => picture.nodes[id].name);
    return [box.name, ...inside].some((name) => name.toLowerCase().includes(query));
  };
})(fxprune);
