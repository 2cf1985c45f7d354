// Positions of the boxes, frames and edges of a scene: dagre arranges them from top to bottom.
(function (api) {
  "use strict";

  const GAP = 34;
  const NAME = 12; // space for a frame's name above the first row

  function build(dagre, scene) {
    const graph = new dagre.graphlib.Graph({ compound: true });
    graph.setGraph({ rankdir: "TB", nodesep: 26, edgesep: 16, ranksep: GAP });
    graph.setDefaultEdgeLabel(() => ({}));
    for (const frame of scene.frames) graph.setNode(frame.key, {});
    for (const box of scene.boxes) graph.setNode(box.key, { width: box.w, height: box.h });
    for (const item of scene.frames.concat(scene.boxes)) {
      if (item.parent) graph.setParent(item.key, item.parent);
    }
    for (const edge of scene.edges) graph.setEdge(edge.from, edge.to, { weight: 1 });
    return graph;
  }

  /** The rows of boxes, from the top. Edges bend only between rows, so they never cross a box. */
  function rowsOf(boxes) {
    const rows = {};
    for (const box of boxes) {
      const key = Math.round(box.y);
      const row = rows[key] || (rows[key] = { y: box.y, top: box.y, bottom: box.y });
      row.top = Math.min(row.top, box.y - box.h / 2);
      row.bottom = Math.max(row.bottom, box.y + box.h / 2);
    }
    return rows;
  }

  /** The vertical lines of an edge, one per row that it passes. */
  function stopsOf(edge, points, boxes, rows) {
    const [a, b] = [boxes[edge.from], boxes[edge.to]];
    const stops = [{ x: a.x, top: a.y + a.h / 2, bottom: rows[Math.round(a.y)].bottom }];
    for (const point of points.slice(1, -1)) {
      const row = rows[Math.round(point.y)];
      if (row) stops.push({ x: point.x, top: row.top, bottom: row.bottom });
    }
    stops.push({ x: b.x, top: rows[Math.round(b.y)].top, bottom: b.y - b.h / 2 });
    return stops;
  }

  /** Shrinks frames to their contents: boxes, inner frames, and edges that begin and end inside. */
  function tighten(frames, boxes, edges, graph) {
    const parents = {};
    for (const item of frames.concat(boxes)) parents[item.key] = item.parent;
    const holds = (frame, key) => key !== null && key !== undefined && (key === frame || holds(frame, parents[key]));
    for (const frame of frames) {
      const inner = boxes.filter((box) => holds(frame.key, box.key));
      const depth = Math.max(...inner.map((box) => depthOf(frame.key, box.key, parents)));
      const sides = inner.map((box) => [box.x - box.w / 2, box.x + box.w / 2]);
      for (const edge of edges) {
        if (!holds(frame.key, edge.from) || !holds(frame.key, edge.to)) continue;
        for (const point of graph.edge(edge.from, edge.to).points) sides.push([point.x, point.x]);
      }
      const pad = 10 + 6 * depth;
      frame.left = Math.max(frame.left, Math.min(...sides.map((side) => side[0])) - pad);
      frame.right = Math.min(frame.right, Math.max(...sides.map((side) => side[1])) + pad);
    }
  }

  function depthOf(frame, key, parents) {
    return parents[key] === frame ? 1 : 1 + depthOf(frame, parents[key], parents);
  }

  /** Moves the contents of frames down by the height of their names; returns the function that moves the rest. */
  function roomForNames(frames) {
    const tops = Array.from(new Set(frames.map((frame) => frame.top)));
    const lower = (y) => y + NAME * tops.filter((top) => top < y).length;
    for (const frame of frames) Object.assign(frame, { top: lower(frame.top), bottom: lower(frame.bottom) });
    return lower;
  }

  function place(dagre, scene) {
    const graph = build(dagre, scene);
    dagre.layout(graph);
    const placed = {};
    for (const box of scene.boxes) {
      const at = graph.node(box.key);
      placed[box.key] = Object.assign({}, box, { x: at.x, y: at.y });
    }
    const boxes = scene.boxes.map((box) => placed[box.key]);
    const frames = scene.frames.map(function (frame) {
      const at = graph.node(frame.key);
      return Object.assign({}, frame, {
        left: at.x - at.width / 2,
        right: at.x + at.width / 2,
        top: at.y - at.height / 2,
        bottom: at.y + at.height / 2,
      });
    });
    tighten(frames, boxes, scene.edges, graph);
    const lower = roomForNames(frames);
    for (const box of boxes) box.y = lower(box.y);
    const rows = rowsOf(boxes);
    const edges = scene.edges.map(function (edge) {
      const points = graph.edge(edge.from, edge.to).points.map((point) => ({ x: point.x, y: lower(point.y) }));
      return Object.assign({}, edge, { stops: stopsOf(edge, points, placed, rows), turns: {} });
    });
    return { boxes: boxes, frames: frames, edges: edges, rows: Object.values(rows).sort((a, b) => a.y - b.y) };
  }

  /**
   * Compute the layout of a picture. `fit` {width, height} is the window that the columns fill; null: a single column.
   * `kept` maps blocks to the columns in which they stay.
   * Boxes get their centre x, y; frames left, right, top, bottom; edges their vertical lines.
   */
  api.layout = function (picture, state, fit, kept) {
    const plan = place(globalThis.dagre, api.scene(picture, state));
    const columns = api.wrap(plan, fit, kept);
    return {
      boxes: plan.boxes,
      frames: plan.frames,
      edges: plan.edges,
      width: columns.width,
      height: columns.height,
      columns: columns.length,
    };
  };
})(fxprune);
