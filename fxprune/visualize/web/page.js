// The page: unfolding of blocks, keys, search, budgets, themes.
(function (api) {
  "use strict";

  const picture = JSON.parse(document.getElementById("data").textContent);
  const at = (id) => document.getElementById(id);
  const [svg, drawing, canvas] = [at("picture"), at("drawing"), at("canvas")];
  const prefersDark = window.matchMedia("(prefers-color-scheme: dark)");
  const state = { open: {}, plan: picture.initial, theme: prefersDark.matches ? "dark" : "light", live: true };
  const view = api.makeView(svg, drawing, canvas);
  let plan = null;
  let columns = {}; // the column of every block while all are folded; blocks stay there when they unfold
  let window_ = null;
  let chosen = null;
  let hits = [];
  let hit = -1; // index of the hit that is in focus

  // The drawing ------------------------------------------------------------------------------------------------------

  /** The size of the window that columns fill, when it was last visible; null on a narrow screen. */
  function room() {
    if (!canvas.hidden) window_ = { width: canvas.clientWidth, height: canvas.clientHeight, most: 1 };
    return window_.width < 600 ? null : window_;
  }

  function groupOf(key) {
    return Array.from(drawing.children).find((child) => child.dataset.key === key) || null;
  }

  function boxOf(key) {
    return plan.boxes.find((box) => box.key === key);
  }

  function draw() {
    const focused = drawing.contains(document.activeElement) ? document.activeElement.dataset.key : null;
    const folded = !Object.keys(state.open).length;
    plan = api.layout(picture, state, room(), folded ? null : columns);
    if (folded)
      columns = Object.fromEntries(
        plan.boxes.filter((box) => box.block !== undefined).map((box) => [box.block, box.column]),
      );
    view.plan = plan;
    drawing.innerHTML = api.drawing(picture, plan, state);
    mark();
    if (focused) focusOn(focused);
  }

  /** Keep the focus on a block when it becomes a frame or a box again. */
  function focusOn(key) {
    const other = key.charAt(0) === "b" ? "g:" + key.slice(1) : "b" + key.slice(2);
    const group = groupOf(key) || groupOf(other);
    if (group) group.focus({ preventScroll: true });
  }

  function mark() {
    const query = at("query").value.trim().toLowerCase();
    hits = query ? plan.boxes.filter((box) => api.matches(picture, box, query)) : [];
    const found = new Set(hits.map((box) => box.key));
    for (const child of drawing.children) {
      child.classList.toggle("hit", found.has(child.dataset.key));
      child.classList.toggle("chosen", child.dataset.key === chosen);
    }
  }

  /** The position of a block, folded or not: the middle of its upper edge. */
  function anchor(block) {
    const box = boxOf("b" + block);
    if (box) return { x: box.x, y: box.y - box.h / 2 };
    const frame = plan.frames.find((one) => one.key === "g:" + block);
    return { x: (frame.left + frame.right) / 2, y: frame.top };
  }

  function toggle(block) {
    const before = anchor(block);
    if (state.open[block]) delete state.open[block];
    else state.open[block] = true;
    draw();
    const after = anchor(block);
    view.pan((before.x - after.x) * view.scale, (before.y - after.y) * view.scale);
    at("fold").disabled = Object.keys(state.open).length === 0;
  }

  // Details ----------------------------------------------------------------------------------------------------------

  function show(key, spoken) {
    const box = boxOf(key);
    if (!box) return;
    at("details").setAttribute("aria-live", spoken ? "polite" : "off");
    at("details").replaceChildren(...api.details(picture, state, box));
  }

  function choose(key) {
    chosen = key;
    mark();
    show(key, true);
  }

  function press(group) {
    const key = group.dataset.key;
    if (key.charAt(0) === "g") return toggle(Number(key.slice(2)));
    choose(key);
    if (key.charAt(0) === "b") toggle(Number(key.slice(1)));
    return undefined;
  }

  function target(event) {
    const group = event.target.closest ? event.target.closest("[data-key]") : null;
    return group && (group.classList.contains("box") || group.classList.contains("open")) ? group : null;
  }

  // Keys -------------------------------------------------------------------------------------------------------------

  function walk(key, arrow) {
    const next = api.neighbour(picture, plan, key, arrow);
    if (next) groupOf(next).focus({ preventScroll: true });
  }

  function onKey(event) {
    const group = target(event);
    if (!group) return;
    if (event.key.startsWith("Arrow")) walk(group.dataset.key, event.key);
    else if (event.key === "Enter" || event.key === " ") press(group);
    else return;
    event.preventDefault();
  }

  function onShortcut(event) {
    if (event.ctrlKey || event.metaKey || event.altKey || /^(INPUT|TEXTAREA)$/.test(event.target.tagName)) return;
    const actions = {
      "+": () => view.zoomMiddle(1.25),
      "=": () => view.zoomMiddle(1.25),
      "-": () => view.zoomMiddle(0.8),
      0: () => view.fit(),
      "/": () => at("query").focus(),
    };
    if (!actions[event.key]) return;
    actions[event.key]();
    event.preventDefault();
  }

  // Budget -----------------------------------------------------------------------------------------------------------

  function budget() {
    const { plans } = picture;
    if (!plans.length) return at("choice").append(api.make("p", { class: "soft" }, ["No budget was planned for."]));
    const { input, shown } = api.budgetInput(picture, state.plan);
    at("choice").append(shown);
    input.addEventListener("input", function () {
      const position = plans.length === 1 ? Number(input.checked) : Number(input.value);
      state.plan = position ? position - 1 : null;
      replan();
    });
    return undefined;
  }

  function replan() {
    draw();
    view.move();
    words();
    if (chosen) show(chosen, false);
  }

  function words() {
    const text = api.budgetText(picture, state.plan);
    at("chosen").textContent = text;
    if (at("plan")) at("plan").setAttribute("aria-valuetext", text);
    at("change").replaceChildren(at("change").caption, ...api.changeRows(picture, state.plan));
    at("gone").hidden = state.plan === null;
    at("gone").lastElementChild.replaceChildren(...api.removedItems(picture, state.plan));
    at("caption").textContent = api.caption(picture, state.plan);
    at("table").replaceChildren(api.table(picture, state));
  }

  function goTo(event) {
    const button = event.target.closest("[data-block]");
    if (!button) return;
    const block = Number(button.dataset.block);
    showTable(false);
    const key = state.open[block] ? "n" + picture.blocks[block].nodes[0] : "b" + block;
    view.centre(boxOf(key));
    choose(key);
    groupOf(key).focus({ preventScroll: true });
  }

  // Search -----------------------------------------------------------------------------------------------------------

  function nextHit(step) {
    if (!hits.length) return;
    hit = hit < 0 && step < 0 ? hits.length - 1 : (hit + step + hits.length) % hits.length;
    at("hits").textContent = `${hit + 1} of ${hits.length}`;
    showTable(false);
    view.centre(hits[hit]);
    choose(hits[hit].key);
  }

  function watchSearch() {
    at("query").addEventListener("input", function () {
      hit = -1;
      mark();
      at("hits").textContent = at("query").value.trim() ? `${hits.length} found` : "";
    });
    at("query").addEventListener("keydown", function (event) {
      if (event.key !== "Enter") return;
      event.preventDefault();
      nextHit(event.shiftKey ? -1 : 1);
    });
    at("search").addEventListener("submit", (event) => event.preventDefault());
  }

  // Theme, table, print ----------------------------------------------------------------------------------------------

  function theme(name) {
    state.theme = name;
    document.documentElement.dataset.theme = name;
    at("theme").setAttribute("aria-pressed", String(name === "dark"));
    at("legend").querySelector("svg").innerHTML = api.legend(picture, name);
    draw();
    view.move();
  }

  function showTable(shown) {
    at("table").hidden = !shown;
    canvas.hidden = shown;
    at("view").setAttribute("aria-pressed", String(shown));
  }

  function print(before) {
    const last = print.theme || state.theme;
    if (before) {
      print.theme = state.theme;
      showTable(false);
    }
    theme(before ? "light" : last);
    if (before) {
      svg.setAttribute("viewBox", `0 0 ${plan.width} ${plan.height}`);
      drawing.removeAttribute("transform");
    } else {
      svg.removeAttribute("viewBox");
    }
  }

  function watchRest() {
    at("theme").addEventListener("click", () => theme(state.theme === "dark" ? "light" : "dark"));
    prefersDark.addEventListener("change", (event) => theme(event.matches ? "dark" : "light"));
    at("view").addEventListener("click", () => showTable(at("table").hidden));
    document.querySelector(".skip").addEventListener("click", function () {
      showTable(true);
      at("table").focus();
    });
    at("fold").addEventListener("click", function () {
      state.open = {};
      at("fold").disabled = true;
      draw();
      view.fit(true);
    });
    at("zoom").addEventListener("click", function (event) {
      const action = event.target.dataset.zoom;
      if (action === "fit") view.fit();
      else if (action) view.zoomMiddle(action === "in" ? 1.25 : 0.8);
    });
    for (const id of ["gone", "table"]) at(id).addEventListener("click", goTo);
    window.addEventListener("beforeprint", () => print(true));
    window.addEventListener("afterprint", () => print(false));
    let width = window.innerWidth;
    window.addEventListener("resize", function () {
      if (window.innerWidth === width || canvas.hidden) return; // a phone shows or hides its bars
      width = window.innerWidth;
      draw();
      view.fit(true);
    });
  }

  function start() {
    theme(state.theme);
    view.fit(true);
    budget();
    words();
    at("fold").disabled = true;
    at("settings").textContent = api.settingsText(picture);
    svg.addEventListener("keydown", onKey);
    svg.addEventListener("click", function (event) {
      const group = target(event);
      if (group && view.dragged < api.CLICK) press(group);
    });
    svg.addEventListener("pointerover", (event) => target(event) && show(target(event).dataset.key, false));
    svg.addEventListener("focusin", function (event) {
      canvas.scrollTo(0, 0);
      const group = target(event);
      if (!group || !boxOf(group.dataset.key)) return;
      if (group.matches(":focus-visible")) view.reveal(boxOf(group.dataset.key));
      show(group.dataset.key, true);
    });
    document.addEventListener("keydown", onShortcut);
    watchSearch();
    watchRest();
  }

  start();
})(fxprune);
