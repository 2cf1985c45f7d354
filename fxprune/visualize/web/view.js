// The visible part of the drawing: pan, zoom, pinch, and moving to a box.
(function (api) {
  "use strict";

  const READABLE = 0.72; // the least scale at which the smallest text can be read

  api.makeView = function (svg, drawing, canvas) {
    const view = { x: 0, y: 0, scale: 1, plan: null };
    const area = () => ({ width: canvas.clientWidth, height: canvas.clientHeight });

    view.move = function () {
      drawing.setAttribute("transform", `translate(${view.x} ${view.y}) scale(${view.scale})`);
    };

    view.pan = function (dx, dy) {
      view.x += dx;
      view.y += dy;
      view.move();
    };

    /** Show the whole drawing; if `readable`, not smaller than can be read. */
    view.fit = function (readable) {
      const { width, height } = area();
      const { plan } = view;
      const whole = Math.min(1, width / plan.width, height / plan.height);
      view.scale = readable ? Math.max(whole, Math.min(READABLE, 1)) : whole;
      const [w, h] = [plan.width * view.scale, plan.height * view.scale];
      const centred = width / 2 - plan.boxes[0].x * view.scale; // puts the first box in the middle
      view.x = w <= width ? (width - w) / 2 : Math.min(0, Math.max(centred, width - w));
      view.y = Math.max(0, (height - h) / 2);
      view.move();
    };

    view.zoom = function (factor, x, y) {
      const scale = Math.min(3, Math.max(0.1, view.scale * factor));
      view.x = x - ((x - view.x) * scale) / view.scale;
      view.y = y - ((y - view.y) * scale) / view.scale;
      view.scale = scale;
      view.move();
    };

    view.zoomMiddle = (factor) => view.zoom(factor, area().width / 2, area().height / 2);

    view.centre = function (box) {
      view.scale = Math.max(view.scale, READABLE);
      view.x = area().width / 2 - box.x * view.scale;
      view.y = area().height / 2 - box.y * view.scale;
      view.move();
    };

    /** Pan just far enough to show a box. */
    view.reveal = function (box) {
      const { width, height } = area();
      const [x, y] = [box.x * view.scale + view.x, box.y * view.scale + view.y];
      const [w, h] = [(box.w / 2) * view.scale + 12, (box.h / 2) * view.scale + 12];
      view.pan(Math.max(0, w - x) - Math.max(0, x + w - width), Math.max(0, h - y) - Math.max(0, y + h - height));
    };

    watchWheel(view, svg, canvas);
    watchPointers(view, svg, canvas);
    return view;
  };

  function watchWheel(view, svg, canvas) {
    svg.addEventListener(
      "wheel",
      function (event) {
        event.preventDefault();
        const at = canvas.getBoundingClientRect();
        const unit = event.deltaMode === 1 ? 18 : 1;
        view.zoom(Math.exp(-event.deltaY * unit * 0.0016), event.clientX - at.left, event.clientY - at.top);
      },
      { passive: false },
    );
  }

  function watchPointers(view, svg, canvas) {
    const down = new Map();
    view.dragged = 0; // distance of the pointers since the first went down: a click does not drag
    const place = (event) => ({ x: event.clientX, y: event.clientY });
    svg.addEventListener("pointerdown", function (event) {
      if (!down.size) view.dragged = 0;
      down.set(event.pointerId, place(event));
    });
    svg.addEventListener("pointermove", function (event) {
      const last = down.get(event.pointerId);
      if (!last) return;
      const now = place(event);
      view.dragged += Math.hypot(now.x - last.x, now.y - last.y);
      down.set(event.pointerId, now);
      if (view.dragged < api.CLICK) return;
      if (!svg.hasPointerCapture(event.pointerId)) svg.setPointerCapture(event.pointerId);
      svg.classList.add("dragged");
      const other = Array.from(down.entries()).find(([id]) => id !== event.pointerId);
      if (other) pinch(view, last, now, other[1], canvas.getBoundingClientRect());
      else view.pan(now.x - last.x, now.y - last.y);
    });
    for (const name of ["pointerup", "pointercancel"]) {
      svg.addEventListener(name, function (event) {
        down.delete(event.pointerId);
        if (!down.size) svg.classList.remove("dragged");
      });
    }
  }

  function pinch(view, last, now, other, at) {
    const length = (one) => Math.hypot(one.x - other.x, one.y - other.y) || 1;
    view.zoom(length(now) / length(last), (now.x + other.x) / 2 - at.left, (now.y + other.y) / 2 - at.top);
    view.pan((now.x - last.x) / 2, (now.y - last.y) / 2);
  }

  api.CLICK = 5;
})(fxprune);
