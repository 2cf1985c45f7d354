// Colours, text and tags of a picture.
(function (api) {
  "use strict";

  const CIVIDIS = [
    "00224e",
    "083370",
    "35456c",
    "4f576c",
    "666970",
    "7d7c78",
    "948e77",
    "aea371",
    "c8b866",
    "e5cf52",
    "fee838",
  ];
  const THEMES = {
    light: {
      paper: "#ffffff",
      ink: "#1b1f24",
      soft: "#57606a",
      line: "#6e7781",
      ghost: "#a8b0b9",
      frame: "#f4f6f8",
      open: "#e9edf1",
      rim: "#d3d9df",
      still: "#ffffff",
      stillRim: "#8c959f",
      wire: "#d6246e",
      hit: "#0969da",
    },
    dark: {
      paper: "#0f1318",
      ink: "#e8ecf1",
      soft: "#a3adb8",
      line: "#8b96a3",
      ghost: "#5a6571",
      frame: "#171c23",
      open: "#202731",
      rim: "#343d48",
      still: "#1a2028",
      stillRim: "#5d6875",
      wire: "#ff6aa8",
      hit: "#6cb6ff",
    },
  };
  const FAMILY = "Inter, Helvetica, Arial, sans-serif";

  const round = (value) => Math.round(value * 10) / 10;

  /** Escape a text for use between tags and in attributes. */
  api.escape = function (text) {
    const known = { "&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;", "'": "&#39;" };
    // eslint-disable-next-line no-control-regex
    return String(text)
      .replace(/[\u0000-\u0008\u000b\u000c\u000e-\u001f\ufffe\uffff]/g, "\ufffd")
      .replace(/[\ud800-\udbff](?![\udc00-\udfff])|(?<![\ud800-\udbff])[\udc00-\udfff]/g, "\ufffd")
      .replace(/[&<>"']/g, (sign) => known[sign]);
  };

  function tag(name, attributes, content) {
    const written = Object.entries(attributes)
      .filter(([, value]) => value !== undefined && value !== null)
      .map(([key, value]) => ` ${key}="${api.escape(typeof value === "number" ? round(value) : value)}"`);
    return `<${name}${written.join("")}${content === undefined ? "/>" : `>${content}</${name}>`}`;
  }

  function text(x, y, content, size, fill, more) {
    const attributes = Object.assign({ x: x, y: y, "font-size": size, fill: fill }, more);
    return tag("text", attributes, api.escape(content));
  }

  function hex(value) {
    return Math.round(value).toString(16).padStart(2, "0");
  }

  /** The colour of an importance between 0 (least) and 1 (most). */
  api.cividis = function (share) {
    const at = Math.min(Math.max(share, 0), 1) * (CIVIDIS.length - 1);
    const low = Math.min(Math.floor(at), CIVIDIS.length - 2);
    const parts = [0, 2, 4].map(function (i) {
      const [a, b] = [CIVIDIS[low], CIVIDIS[low + 1]].map((colour) => parseInt(colour.slice(i, i + 2), 16));
      return hex(a + (b - a) * (at - low));
    });
    return "#" + parts.join("");
  };

  function luminance(colour) {
    const parts = [1, 3, 5]
      .map((i) => parseInt(colour.slice(i, i + 2), 16) / 255)
      .map((value) => (value <= 0.03928 ? value / 12.92 : Math.pow((value + 0.055) / 1.055, 2.4)));
    return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2];
  }

  api.readable = (colour) => (luminance(colour) > 0.179 ? "#000000" : "#ffffff");

  api.shareOf = function (picture, region) {
    return picture.regions.length > 1 ? (region.rank - 1) / (picture.regions.length - 1) : 0;
  };

  api.theme = (name) => THEMES[name];
  api.svgTag = tag;
  api.svgText = text;
  api.family = FAMILY;
})(fxprune);
