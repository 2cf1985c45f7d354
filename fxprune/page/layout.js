// Places for the boxes, frames and edges of a scene: dagre stacks them, then a tall stack is cut into columns.
(function (api) {
  "use strict";

  const GAP = 34;
  const MARGIN = 18;
  const NAME = 12; // what a frame's name needs above the first row
  const TRACK = 9; // between edges that run side by side from one column to the next

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

  /** The rows of boxes, from the top: edges bend between rows only, so they never cross a box. */
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

  /** The verticals of an edge, one for each row that it passes. */
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

  /** Draws frames in to what they hold: boxes, inner frames, and edges that begin and end inside. */
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

  /** Moves the frames' contents down by the height of their names; returns what moves everything else along. */
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
      return Object.assign({}, frame, { left: at.x - at.width / 2, right: at.x + at.width / 2,
        top: at.y - at.height / 2, bottom: at.y + at.height / 2 });
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

  // Columns ----------------------------------------------------------------------------------------------------------

  function crossing(stops, y) {
    for (let i = 0; i + 1 < stops.length; i += 1) {
      if (stops[i].bottom <= y && stops[i + 1].top >= y) return i;
    }
    return -1;
  }

  /** The gaps between rows, with what it costs to cut there. */
  function gapsOf(plan) {
    const gaps = [];
    for (let i = 0; i + 1 < plan.rows.length; i += 1) {
      const y = (plan.rows[i].bottom + plan.rows[i + 1].top) / 2;
      const crossed = plan.edges.filter((edge) => crossing(edge.stops, y) >= 0).length;
      const opened = plan.frames.filter((frame) => frame.kind === "open" && frame.top < y && frame.bottom > y).length;
      const through = plan.edges.filter((edge) => edge.stops.some((stop) => stop.top < y && stop.bottom > y)).length;
      if (!through) gaps.push({ y: y, cost: 30 * crossed + 400 * opened });
    }
    return gaps;
  }

  function cutsFor(count, gaps, top, bottom) {
    const cuts = [];
    const part = (bottom - top) / count;
    for (let i = 1; i < count; i += 1) {
      const ideal = top + i * part;
      const after = cuts.length ? cuts[cuts.length - 1] : top;
      const price = (gap) => gap.cost + Math.abs(gap.y - ideal);
      const usable = gaps.filter((gap) => gap.y > after + part / 3 && Math.abs(gap.y - ideal) < part / 2);
      if (!usable.length) return null;
      cuts.push(usable.reduce((best, gap) => (price(gap) < price(best) ? gap : best)).y);
    }
    return cuts;
  }

  /** Cuts that leave every block in the column where it was, as far as that goes. */
  function cutsKept(gaps, boxes, kept) {
    const cuts = [];
    const known = boxes.filter((box) => kept[box.block] !== undefined);
    const last = Math.max(0, ...Object.values(kept));
    for (let column = 1; column <= last; column += 1) {
      const strays = (gap) => known.filter((box) => (kept[box.block] < column) === (box.y > gap.y)).length;
      const price = (gap) => 1000 * strays(gap) + gap.cost;
      const usable = gaps.filter((gap) => gap.y > (cuts.length ? cuts[cuts.length - 1] : -Infinity));
      if (usable.length) cuts.push(usable.reduce((best, gap) => (price(gap) < price(best) ? gap : best)).y);
    }
    return cuts;
  }

  function extent(plan, top, bottom) {
    let [left, right, high, low] = [Infinity, -Infinity, Infinity, -Infinity];
    const grow = function (x0, x1, y0, y1) {
      if (y1 < top || y0 > bottom) return;
      left = Math.min(left, x0);
      right = Math.max(right, x1);
      high = Math.min(high, Math.max(y0, top));
      low = Math.max(low, Math.min(y1, bottom));
    };
    for (const box of plan.boxes) grow(box.x - box.w / 2, box.x + box.w / 2, box.y - box.h / 2, box.y + box.h / 2);
    for (const frame of plan.frames) grow(frame.left, frame.right, frame.top, frame.bottom);
    for (const edge of plan.edges) {
      for (const stop of edge.stops) grow(stop.x - 2, stop.x + 2, stop.top, stop.bottom);
    }
    return { left: left, right: right, high: high, low: low };
  }

  /** Columns from the left: where each begins and ends in the stack, and how far it moves. */
  function columnsOf(plan, cuts) {
    const bounds = [-Infinity].concat(cuts, [Infinity]);
    const columns = [];
    let x = 0;
    const lanes = cuts.map((y) => plan.edges.filter((edge) => crossing(edge.stops, y) >= 0).length);
    const rise = TRACK * Math.max(0, ...lanes);
    for (let i = 0; i + 1 < bounds.length; i += 1) {
      const size = extent(plan, bounds[i], bounds[i + 1]);
      columns.push({ from: bounds[i], to: bounds[i + 1], left: size.left, right: size.right, low: size.low,
        dx: x - size.left, dy: rise - size.high, lanes: lanes[i] || 0 });
      x += size.right - size.left + 30 + TRACK * (lanes[i] || 0);
    }
    columns.width = x - 30;
    columns.height = rise + Math.max(...columns.map((column) => column.low + column.dy)) + rise;
    return columns;
  }

  function columnAt(columns, y) {
    return columns.findIndex((column) => y >= column.from && y < column.to);
  }

  /** The corners of an edge's way from the foot of one column over to the head of the next. */
  function turn(columns, index, lane, from, to) {
    const [here, next] = [columns[index], columns[index + 1]];
    const foot = here.low + here.dy + 6 + TRACK * lane;
    const gutter = here.right + here.dx + 15 + TRACK * lane;
    const head = next.dy + next.high - 8 - TRACK * (here.lanes - 1 - lane);
    return [[from, foot], [gutter, foot], [gutter, head], [to, head]];
  }

  function wrapEdges(plan, columns) {
    for (const column of columns) column.high = extent(plan, column.from, column.to).high;
    for (let i = 0; i + 1 < columns.length; i += 1) {
      const y = columns[i].to;
      const over = plan.edges.map((edge) => ({ edge: edge, at: crossing(edge.stops, y) })).filter((one) => one.at >= 0);
      over.sort((a, b) => b.edge.stops[b.at].x - a.edge.stops[a.at].x);
      over.forEach(function (one, lane) {
        const [a, b] = [one.edge.stops[one.at], one.edge.stops[one.at + 1]];
        one.edge.turns[one.at] = turn(columns, i, lane, a.x + columns[i].dx, b.x + columns[i + 1].dx);
      });
    }
  }

  function move(plan, columns) {
    const shift = (y) => columns[columnAt(columns, y)];
    for (const box of plan.boxes) {
      const column = shift(box.y);
      Object.assign(box, { row: box.y, column: columns.indexOf(column), x: box.x + column.dx, y: box.y + column.dy });
    }
    for (const edge of plan.edges) {
      edge.stops = edge.stops.map(function (stop) {
        const { dx, dy } = shift((stop.top + stop.bottom) / 2);
        return { x: stop.x + dx, top: stop.top + dy, bottom: stop.bottom + dy };
      });
    }
    plan.frames = [].concat(...plan.frames.map((frame) => slices(frame, columns)));
  }

  /** The pieces of a frame, one in each column that it reaches into. */
  function slices(frame, columns) {
    const reached = columns.filter((column) => frame.top < column.to && frame.bottom > column.from);
    return reached.map(function (column, piece) {
      return Object.assign({}, frame, {
        piece: piece,
        left: frame.left + column.dx,
        right: frame.right + column.dx,
        top: (piece ? column.high : frame.top) + column.dy,
        bottom: (piece + 1 < reached.length ? column.low : frame.bottom) + column.dy,
      });
    });
  }

  /** The columns in which the whole is shown largest in a window of this width and height. */
  function bestColumns(plan, fit) {
    const all = extent(plan, -Infinity, Infinity);
    const gaps = gapsOf(plan);
    let best = columnsOf(plan, []);
    let scale = 0;
    for (let count = 1; count <= (fit ? 8 : 1); count += 1) {
      const cuts = cutsFor(count, gaps, all.high, all.low);
      if (!cuts) continue;
      const columns = columnsOf(plan, cuts);
      if (!fit) return columns;
      const fits = Math.min(fit.most || 1, fit.width / (columns.width + 2 * MARGIN), fit.height / (columns.height + 2 * MARGIN));
      if (fits > scale * 1.08) [best, scale] = [columns, fits];
    }
    return best;
  }

  /**
   * Lay a picture out. `fit` {width, height} is the window to be filled by columns; null: a single column.
   * `kept` says of blocks in which column they are to stay.
   * Boxes have their centre in x, y; frames left, right, top, bottom; edges the verticals they run along.
   */
  api.layout = function (picture, state, fit, kept) {
    const plan = place(globalThis.dagre || dagre, api.scene(picture, state));
    const columns = kept ? columnsOf(plan, cutsKept(gapsOf(plan), plan.boxes, kept)) : bestColumns(plan, fit);
    wrapEdges(plan, columns);
    move(plan, columns);
    shiftAll(plan, MARGIN, MARGIN);
    return { boxes: plan.boxes, frames: plan.frames, edges: plan.edges,
      width: columns.width + 2 * MARGIN, height: columns.height + 2 * MARGIN, columns: columns.length };
  };

  function shiftAll(plan, dx, dy) {
    for (const box of plan.boxes) Object.assign(box, { x: box.x + dx, y: box.y + dy });
    for (const frame of plan.frames) {
      Object.assign(frame, { left: frame.left + dx, right: frame.right + dx, top: frame.top + dy, bottom: frame.bottom + dy });
    }
    for (const edge of plan.edges) {
      for (const stop of edge.stops) Object.assign(stop, { x: stop.x + dx, top: stop.top + dy, bottom: stop.bottom + dy });
      for (const corners of Object.values(edge.turns)) {
        for (const corner of corners) Object.assign(corner, [corner[0] + dx, corner[1] + dy]);
      }
    }
  }
})(fxprune);
