// A static picture for print: the drawing, the legend below it, and one line that describes the plan.
(function (api) {
  "use strict";

  const { svgTag: tag, svgText: text } = api;
  const NAMESPACE = "http://www.w3.org/2000/svg";

  function change(picture, after, key, name, write) {
    const before = picture.before[key];
    const saved = before ? (after[key] / before - 1) * 100 : 0;
    const share = `${saved > 0 ? "+" : "\u2212"}${Math.abs(saved).toFixed(1)} %`;
    return `${name} ${write(before)} to ${write(after[key])} (${share})`;
  }

  api.costName = (picture) => ({ flops: "FLOPs", params: "parameters" })[picture.cost] || picture.cost;

  /** The removals and costs of a plan, in one line. */
  api.caption = function (picture, index) {
    const { before, settings } = picture;
    if (index === null || index === undefined) {
      return (
        `${api.quantity(before.flops)} FLOPs, ${api.quantity(before.params)} parameters, ` +
        `${picture.regions.length} candidates scored by ${settings.criterion}`
      );
    }
    const plan = picture.plans[index];
    const count = plan.removed.length === 1 ? "1 region" : `${plan.removed.length} regions`;
    return (
      `budget ${api.percent(plan.budget)} of ${api.costName(picture)}: ${count} removed; ` +
      api
        .costs(picture)
        .filter(([key]) => key !== "blocks")
        .map(([key, name, write]) => change(picture, plan.after, key, name, write))
        .join(", ")
    );
  };

  /** The scores at the least important, the middle and the most important rank. */
  api.quantiles = function (picture) {
    const sorted = picture.regions.slice().sort((a, b) => a.rank - b.rank);
    if (!sorted.length) return [];
    return [0, 0.25, 0.5, 0.75, 1].map((share) => ({
      share: share,
      score: sorted[Math.round(share * (sorted.length - 1))].score,
    }));
  };

  api.score = function (value) {
    if (typeof value !== "number") return "none";
    if (value === 0) return "0";
    const exponent = Math.floor(Math.log10(Math.abs(value)));
    return exponent < -3 || exponent > 4
      ? value.toExponential(1).replace("e+", "e").replace(/-/g, "\u2212")
      : String(Number(value.toPrecision(2)));
  };

  /** The colour scale with its scores. */
  api.scale = function (picture, themeName, x, y, width) {
    const theme = api.theme(themeName);
    const steps = 48;
    let markup = text(x, y + 10, "importance by rank", 10.5, theme.ink, { "font-weight": 600 });
    for (let i = 0; i < steps; i += 1) {
      markup += tag("rect", {
        x: x + (i * width) / steps,
        y: y + 17,
        width: width / steps + 0.4,
        height: 10,
        fill: api.cividis(i / (steps - 1)),
      });
    }
    for (const { share, score } of api.quantiles(picture)) {
      const anchor = share === 0 ? "start" : share === 1 ? "end" : "middle";
      const at = x + share * width;
      markup += tag("path", { d: `M${Math.round(at * 10) / 10} ${y + 27}v3`, stroke: theme.soft });
      markup += text(at, y + 40, api.score(score), 9.5, theme.soft, { "text-anchor": anchor });
    }
    const ends = [
      ["least", x, "start"],
      [`score (${picture.settings.criterion})`, x + width / 2, "middle"],
      ["most", x + width, "end"],
    ];
    return (
      markup +
      ends.map(([word, at, anchor]) => text(at, y + 51, word, 9.5, theme.soft, { "text-anchor": anchor })).join("")
    );
  };

  function sample(theme, x, y, style) {
    const box = { x: x + 0.5, y: y + 0.5, width: 24, height: 14, rx: 4 };
    const looks = {
      removed: [
        { fill: theme.paper, stroke: theme.soft, "stroke-dasharray": "4 2.5" },
        `M${x + 3} ${y + 3}l18 9m0 -9l-18 9`,
      ],
      partly: [
        { fill: theme.still, stroke: theme.ink, "stroke-dasharray": "4 2.5" },
        `M${x + 12} ${y + 1}l12 10m-6 -10l6 5`,
      ],
      still: [{ fill: theme.still, stroke: theme.stillRim }, ""],
    };
    if (style === "wire") return tag("path", { d: `M${x} ${y + 7.5}h24`, stroke: theme.wire, "stroke-width": 3 });
    if (style === "ghost")
      return tag("path", {
        d: `M${x} ${y + 7.5}h24`,
        stroke: theme.ghost,
        "stroke-width": 1.2,
        "stroke-dasharray": "3 4",
      });
    const [attributes, marks] = looks[style];
    return (
      tag("rect", Object.assign(box, attributes)) +
      (marks ? tag("path", { d: marks, stroke: theme.soft, fill: "none" }) : "")
    );
  }

  const SIGNS = [
    ["removed", "removed"],
    ["partly", "removed in part"],
    ["wire", "where the signal goes now"],
    ["ghost", "no longer connected"],
    ["still", "cannot be removed as a whole"],
  ];

  /** The signs in the picture, in columns of `rows` rows. */
  api.signs = function (themeName, x, y, signs, rows) {
    const theme = api.theme(themeName);
    return signs
      .map(function ([style, words], i) {
        const [left, top] = [x + Math.floor(i / rows) * 190, y + (i % rows) * 22];
        return sample(theme, left, top, style) + text(left + 32, top + 11.5, words, 10.5, theme.ink);
      })
      .join("");
  };

  /** The colour scale and all signs: the legend of the page. */
  api.legend = function (picture, themeName) {
    const scale = picture.regions.length ? api.scale(picture, themeName, 4, 0, 280) : "";
    return scale + api.signs(themeName, 4, 66, SIGNS, 5);
  };

  function usedSigns(plan) {
    const status = new Set(plan.boxes.map((box) => box.status));
    const styles = new Set(plan.edges.map((edge) => edge.style));
    return SIGNS.filter(([sign]) => sign === "still" || status.has(sign) || styles.has(sign));
  }

  function wrapWords(line, most, size) {
    const lines = [""];
    for (const word of line.split(" ")) {
      const longer = (lines[lines.length - 1] + " " + word).trim();
      if (api.textWidth(longer, size, 400) > most && lines[lines.length - 1]) lines.push(word);
      else lines[lines.length - 1] = longer;
    }
    return lines;
  }

  /** The content of an SVG file. `style` is the text of its style element, such as the font. */
  api.figure = function (picture, state, fit, style) {
    const plan = api.layout(picture, state, fit);
    const theme = api.theme(state.theme);
    const signs = usedSigns(plan);
    const legend = 290 + Math.ceil(signs.length / 2) * 190;
    const narrow = plan.width < legend;
    const width = Math.max(plan.width, narrow ? 440 : legend + 36);
    const lines = wrapWords(api.caption(picture, state.plan), width - 40, 12);
    const foot = plan.height + 6;
    const below = foot + 62 + (narrow ? 54 : 0);
    const height = below + 20 + 17 * lines.length + 16;
    const parts = [
      tag("title", {}, api.escape(`${picture.title}: ${api.caption(picture, state.plan)}`)),
      style ? tag("style", {}, style) : "",
      tag("rect", { width: width, height: height, fill: theme.paper }),
      tag(
        "g",
        { transform: `translate(${Math.round((width - plan.width) / 2)} 0)` },
        api.drawing(picture, plan, state),
      ),
      picture.regions.length ? api.scale(picture, state.theme, 20, foot, 260) : "",
      narrow ? api.signs(state.theme, 20, foot + 62, signs, 2) : api.signs(state.theme, 310, foot + 8, signs, 2),
      text(20, below + 18, picture.title, 13, theme.ink, { "font-weight": 600 }),
      lines.map((line, i) => text(20, below + 36 + 17 * i, line, 12, theme.ink)).join(""),
    ];
    const attributes = {
      xmlns: NAMESPACE,
      width: Math.ceil(width),
      height: Math.ceil(height),
      role: "img",
      viewBox: `0 0 ${Math.ceil(width)} ${Math.ceil(height)}`,
      "font-family": api.family,
    };
    return tag("svg", attributes, parts.join(""));
  };
})(fxprune);
