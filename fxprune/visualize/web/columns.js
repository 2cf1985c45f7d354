// Splits a tall picture between rows into columns. Edges lead from the end of one column to the start of the next.
(function (api) {
  "use strict";

  const MARGIN = 18;
  const TRACK = 9; // distance of parallel edges between two columns

  function crossing(stops, y) {
    for (let i = 0; i + 1 < stops.length; i += 1) {
      if (stops[i].bottom <= y && stops[i + 1].top >= y) return i;
    }
    return -1;
  }

  /** The gaps between rows, with the cost of a cut in each. */
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

  /** Cuts that keep every block in its column, if possible. */
  function cutsKept(gaps, boxes, kept) {
    const cuts = [];
    const known = boxes.filter((box) => kept[box.block] !== undefined);
    const last = Math.max(0, ...Object.values(kept));
    for (let column = 1; column <= last; column += 1) {
      const strays = (gap) => known.filter((box) => kept[box.block] < column === box.y > gap.y).length;
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

  /** Columns from the left, each with its start and end in the picture, and its shift. */
  function columnsOf(plan, cuts) {
    const bounds = [-Infinity].concat(cuts, [Infinity]);
    const columns = [];
    let x = 0;
    const lanes = cuts.map((y) => plan.edges.filter((edge) => crossing(edge.stops, y) >= 0).length);
    const rise = TRACK * Math.max(0, ...lanes);
    for (let i = 0; i + 1 < bounds.length; i += 1) {
      const size = extent(plan, bounds[i], bounds[i + 1]);
      columns.push({
        from: bounds[i],
        to: bounds[i + 1],
        left: size.left,
        right: size.right,
        low: size.low,
        dx: x - size.left,
        dy: rise - size.high,
        lanes: lanes[i] || 0,
      });
      x += size.right - size.left + 30 + TRACK * (lanes[i] || 0);
    }
    columns.width = x - 30;
    columns.height = rise + Math.max(...columns.map((column) => column.low + column.dy)) + rise;
    return columns;
  }

  function columnAt(columns, y) {
    return columns.findIndex((column) => y >= column.from && y < column.to);
  }

  /** The corners of an edge from the end of one column to the start of the next. */
  function turn(columns, index, lane, from, to) {
    const [here, next] = [columns[index], columns[index + 1]];
    const foot = here.low + here.dy + 6 + TRACK * lane;
    const gutter = here.right + here.dx + 15 + TRACK * lane;
    const head = next.dy + next.high - 8 - TRACK * (here.lanes - 1 - lane);
    return [
      [from, foot],
      [gutter, foot],
      [gutter, head],
      [to, head],
    ];
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

  /** The pieces of a frame, one per column that it overlaps. */
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

  /** The columns with which the picture is largest in a window of the width and height of `fit`. */
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
      const fits = Math.min(
        fit.most || 1,
        fit.width / (columns.width + 2 * MARGIN),
        fit.height / (columns.height + 2 * MARGIN),
      );
      if (fits > scale * 1.08) [best, scale] = [columns, fits];
    }
    return best;
  }

  /** Arrange a layout in columns: the columns of `kept`, or the columns that fit the window best. */
  api.wrap = function (plan, fit, kept) {
    const columns = kept ? columnsOf(plan, cutsKept(gapsOf(plan), plan.boxes, kept)) : bestColumns(plan, fit);
    wrapEdges(plan, columns);
    move(plan, columns);
    shiftAll(plan, MARGIN, MARGIN);
    return { length: columns.length, width: columns.width + 2 * MARGIN, height: columns.height + 2 * MARGIN };
  };

  function shiftAll(plan, dx, dy) {
    for (const box of plan.boxes) Object.assign(box, { x: box.x + dx, y: box.y + dy });
    for (const frame of plan.frames) {
      Object.assign(frame, {
        left: frame.left + dx,
        right: frame.right + dx,
        top: frame.top + dy,
        bottom: frame.bottom + dy,
      });
    }
    for (const edge of plan.edges) {
      for (const stop of edge.stops)
        Object.assign(stop, { x: stop.x + dx, top: stop.top + dy, bottom: stop.bottom + dy });
      for (const corners of Object.values(edge.turns)) {
        for (const corner of corners) Object.assign(corner, [corner[0] + dx, corner[1] + dy]);
      }
    }
  }
})(fxprune);
