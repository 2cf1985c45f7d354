// A picture as SVG markup. Colours are attributes, so that all SVG programs draw the same.
(function (api) {
  "use strict";

  const { svgTag: tag, svgText: text } = api;
  const round = (value) => Math.round(value * 10) / 10;

  // Edges ------------------------------------------------------------------------------------------------------------

  /** Straight lines through points, with rounded corners. */
  function cornered(points, radius) {
    let path = "";
    for (let i = 1; i + 1 < points.length; i += 1) {
      const [before, at, after] = [points[i - 1], points[i], points[i + 1]];
      const toward = function (other) {
        const length = Math.hypot(other[0] - at[0], other[1] - at[1]) || 1;
        const part = Math.min(radius, length / 2) / length;
        return [round(at[0] + (other[0] - at[0]) * part), round(at[1] + (other[1] - at[1]) * part)];
      };
      path += `L${toward(before).join(" ")}Q${round(at[0])} ${round(at[1])} ${toward(after).join(" ")}`;
    }
    return path + `L${points[points.length - 1].map(round).join(" ")}`;
  }

  function bend(from, to) {
    const [x0, y0, x1, y1] = [from.x, from.bottom, to.x, to.top].map(round);
    const middle = round((y0 + y1) / 2);
    return x0 === x1 ? `L${x1} ${y1}` : `C${x0} ${middle} ${x1} ${middle} ${x1} ${y1}`;
  }

  function pathOf(edge, shortBy) {
    const stops = edge.stops;
    let path = `M${round(stops[0].x)} ${round(stops[0].top)}L${round(stops[0].x)} ${round(stops[0].bottom)}`;
    for (let i = 0; i + 1 < stops.length; i += 1) {
      const [a, b] = [stops[i], stops[i + 1]];
      path += edge.turns[i] ? cornered([[a.x, a.bottom], ...edge.turns[i], [b.x, b.top]], 7) : bend(a, b);
      const end = b.bottom - (i + 2 === stops.length ? shortBy : 0);
      path += `L${round(b.x)} ${round(end)}`;
    }
    return path;
  }

  function edgeMarkup(edge, theme, arrow) {
    const colour = { plain: theme.line, ghost: theme.ghost, wire: theme.wire }[edge.style];
    const width = { plain: 1.4, ghost: 1.2, wire: 3 }[edge.style];
    const end = edge.stops[edge.stops.length - 1];
    const line = tag("path", {
      d: pathOf(edge, arrow ? 4 : 0),
      fill: "none",
      stroke: colour,
      "stroke-width": width,
      "stroke-dasharray": edge.style === "ghost" ? "3 4" : undefined,
    });
    const [x, y, size] = [end.x, end.bottom, edge.style === "wire" ? 5 : 3.6];
    const head = arrow
      ? tag("path", { d: `M${round(x)} ${round(y)}l${-size} ${-size * 1.7}h${2 * size}z`, fill: colour })
      : "";
    return tag(
      "g",
      { class: "edge", "data-from": edge.from, "data-to": edge.to, "data-style": edge.style },
      line + head,
    );
  }

  // Boxes ------------------------------------------------------------------------------------------------------------

  function fillOf(picture, box, theme) {
    const region = box.kind === "block" ? picture.regions[picture.blocks[box.block].region] : undefined;
    return region ? api.cividis(api.shareOf(picture, region)) : theme.still;
  }

  function outline(box, attributes) {
    const radius = { block: 7, node: 5, glue: box.h / 2, port: box.h / 2 }[box.kind];
    const at = { x: box.x - box.w / 2, y: box.y - box.h / 2, width: box.w, height: box.h, rx: radius };
    return tag("rect", Object.assign(at, attributes));
  }

  /** A removed box: a dashed outline, crossed out, with the wire through it if `wired`. */
  function ghost(picture, box, theme, wired) {
    const [left, right, top, bottom] = [box.x - box.w / 2, box.x + box.w / 2, box.y - box.h / 2, box.y + box.h / 2];
    const rim = { fill: theme.paper, stroke: theme.soft, "stroke-width": 1.3, "stroke-dasharray": "5 3" };
    const cross =
      `M${round(left + 4)} ${round(top + 4)}L${round(right - 4)} ${round(bottom - 4)}` +
      `M${round(right - 4)} ${round(top + 4)}L${round(left + 4)} ${round(bottom - 4)}`;
    const wire = wired
      ? tag("path", { d: `M${round(box.x)} ${round(top)}V${round(bottom)}`, stroke: theme.wire, "stroke-width": 3 })
      : "";
    const crossed = tag("path", { d: cross, stroke: theme.ghost, "stroke-width": 1, fill: "none" });
    return outline(box, rim) + crossed + wire;
  }

  function plate(box, y, width, height, theme) {
    return tag("rect", {
      x: box.x - width / 2,
      y: y,
      width: width,
      height: height,
      rx: 4,
      fill: theme.paper,
      "fill-opacity": 0.88,
    });
  }

  function words(box, ink, soft, theme) {
    const middle = { "text-anchor": "middle" };
    const gone = box.status === "removed";
    const bold = Object.assign({ "font-weight": 600, "text-decoration": gone ? "line-through" : undefined }, middle);
    if (box.kind === "block") {
      const widest = Math.max(api.textWidth(box.label, 13, 600), api.textWidth(box.note, 10.5, 400));
      const plates = gone ? plate(box, box.y - 16, widest + 8, 33, theme) : "";
      return (
        plates +
        text(box.x, box.y - 4, box.label, 13, ink, bold) +
        text(box.x, box.y + 13, box.note, 10.5, soft, middle)
      );
    }
    if (box.kind === "node") return nodeWords(box, ink, soft, gone, theme);
    const size = box.label.length === 1 ? 16 : 12;
    const plain = box.kind === "port" ? bold : middle;
    return text(box.x, box.y + size * 0.35, box.label, size, ink, plain);
  }

  function nodeWords(box, ink, soft, gone, theme) {
    const width = api.textWidth(box.label, 11.5, 600);
    const all = width + (box.note ? 7 + api.textWidth(box.note, 11, 400) : 0);
    const left = box.x - all / 2;
    const line = gone ? "line-through" : undefined;
    return (
      (gone ? plate(box, box.y - 8, all + 6, 16, theme) : "") +
      text(left, box.y + 4, box.label, 11.5, ink, { "font-weight": 600, "text-decoration": line }) +
      (box.note ? text(left + width + 7, box.y + 4, box.note, 11, soft) : "")
    );
  }

  function hatch(box, ink) {
    let path = "";
    const [left, top] = [box.x + box.w / 2 - 26, box.y - box.h / 2];
    for (let i = 0; i < 4; i += 1)
      path += `M${round(left + 4 + i * 6)} ${round(top + 1)}L${round(box.x + box.w / 2 - 1)} ${round(top + 22 - i * 6)}`;
    return tag("path", { d: path, stroke: ink, "stroke-width": 1.3, fill: "none" });
  }

  function boxBody(picture, box, theme, wired) {
    if (box.status === "removed") return ghost(picture, box, theme, wired) + words(box, theme.soft, theme.ink, theme);
    const fill = box.kind === "port" ? theme.ink : fillOf(picture, box, theme);
    const coloured = fill !== theme.still;
    const ink = coloured ? api.readable(fill) : theme.ink;
    const soft = coloured ? ink : theme.soft;
    const rim = {
      fill: fill,
      stroke: coloured ? theme.rim : theme.stillRim,
      "stroke-width": 1,
      "stroke-dasharray": box.status === "partly" ? "5 3" : undefined,
    };
    if (box.status === "partly") rim.stroke = theme.ink;
    return outline(box, rim) + (box.status === "partly" ? hatch(box, ink) : "") + words(box, ink, soft, theme);
  }

  /** Describe a box in one sentence. */
  api.sentence = function (picture, box) {
    if (box.kind === "port") return box.label;
    const state = { kept: "", removed: ", removed", partly: ", partly removed" }[box.status];
    if (box.kind === "node") return `node ${box.name}, ${picture.nodes[box.node].op}${state}`;
    if (box.kind === "glue") return `${box.name}${state}`;
    const region = picture.regions[picture.blocks[box.block].region];
    const rank = region ? `, rank ${region.rank} of ${picture.regions.length}` : ", cannot be removed as a whole";
    return `${box.name}${rank}${state}`;
  };

  function access(picture, box, live) {
    const sentence = api.sentence(picture, box);
    if (!live) return { attributes: {}, title: tag("title", {}, api.escape(sentence)) };
    const folds = box.kind === "block" || box.kind === "glue";
    return {
      title: "",
      attributes: {
        tabindex: 0,
        role: box.kind === "port" ? "img" : "button",
        "aria-label": sentence,
        "aria-expanded": folds ? "false" : undefined,
      },
    };
  }

  function boxMarkup(picture, box, theme, live, wired) {
    const { attributes, title } = access(picture, box, live);
    const more = { class: `box ${box.kind} ${box.status}`, "data-key": box.key, "data-name": box.name };
    return tag("g", Object.assign(more, attributes), title + boxBody(picture, box, theme, wired));
  }

  function frameMarkup(frame, theme, live) {
    const open = frame.kind === "open";
    const at = {
      x: frame.left,
      y: frame.top,
      width: frame.right - frame.left,
      height: frame.bottom - frame.top,
      rx: 10,
    };
    const gone = frame.status === "removed";
    const body = tag(
      "rect",
      Object.assign(at, {
        fill: open ? theme.open : theme.frame,
        stroke: gone ? theme.soft : theme.rim,
        "stroke-width": 1,
        "stroke-dasharray": gone ? "5 3" : undefined,
      }),
    );
    const handle =
      open && live && !frame.piece
        ? { tabindex: 0, role: "button", "aria-expanded": "true", "aria-label": `fold ${frame.name}` }
        : {};
    return tag("g", Object.assign({ class: `frame ${frame.kind}`, "data-key": frame.key }, handle), body);
  }

  function frameName(frame, theme) {
    const gone = frame.status === "removed" ? " \u00b7 removed" : "";
    const label = (frame.kind === "open" ? "\u2212 " : "") + frame.label + (frame.piece ? " (continued)" : "") + gone;
    const halo = frame.kind === "open" ? theme.open : theme.frame;
    return text(
      frame.left + 10,
      frame.top + 15,
      api.shorten(label, frame.right - frame.left - 16, 11.5, 600),
      11.5,
      theme.soft,
      { "font-weight": 600, stroke: halo, "stroke-width": 4, "paint-order": "stroke", "pointer-events": "none" },
    );
  }

  /** The boxes with a wire through them. */
  function wiredBoxes(plan) {
    const wires = plan.edges.filter((edge) => edge.style === "wire");
    const [into, out] = [new Set(wires.map((edge) => edge.to)), new Set(wires.map((edge) => edge.from))];
    return (box) => box.status === "removed" && into.has(box.key) && out.has(box.key);
  }

  /** The drawing, without the svg element around it. */
  api.drawing = function (picture, plan, state) {
    const theme = api.theme(state.theme);
    const wired = wiredBoxes(plan);
    const through = new Set(plan.boxes.filter(wired).map((box) => box.key));
    const order = { ghost: 0, plain: 1, wire: 2 };
    const edges = plan.edges.slice().sort((a, b) => order[a.style] - order[b.style]);
    return (
      plan.frames.map((frame) => frameMarkup(frame, theme, state.live)).join("") +
      edges.map((edge) => edgeMarkup(edge, theme, !through.has(edge.to))).join("") +
      plan.frames.map((frame) => frameName(frame, theme)).join("") +
      plan.boxes.map((box) => boxMarkup(picture, box, theme, state.live, through.has(box.key))).join("")
    );
  };
})(fxprune);
