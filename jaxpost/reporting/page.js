"use strict";
// The curves as the page has them, drawn again where a run or an axis is switched, and their values under the pointer.
const { box, runs, charts } = JSON.parse(document.getElementById("data").textContent);
const shown = runs.map(() => true);
const innerWidth_ = box.width - box.left - box.right, innerHeight_ = box.height - box.top - box.bottom;

function node(kind, attributes, text) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", kind);
  for (const name in attributes) made.setAttribute(name, attributes[name]);
  if (text !== undefined) made.textContent = text;
  return made;
}

function ticks(low, high, count, whole) {
  const raw = (high - low) / count, power = 10 ** Math.floor(Math.log10(raw));
  let step = [1, 2, 2.5, 5, 10].map((each) => each * power).find((each) => each >= raw * 0.999);
  if (whole) step = Math.max(1, Math.ceil(step));
  const found = [];
  for (let i = Math.ceil(low / step - 1e-9); i <= high / step + 1e-9; i++) found.push(+(i * step).toPrecision(12));
  return found;
}

function decades(low, high) {
  const found = [];
  for (let power = Math.floor(low); power <= high; power++)
    for (const each of [1, 2, 5]) {
      const place = power + Math.log10(each);
      if (place >= low && place <= high && (each === 1 || high - low < 1.5)) found.push(place);
    }
  const every = Math.ceil(found.length / 5);
  return found.length ? found.filter((_, i) => i % every === 0) : [low, high];
}

function short(value) {
  const size = Math.abs(value);
  for (const [unit, name] of [[1e9, "G"], [1e6, "M"], [1e3, "k"]])
    if (size >= unit * (name === "k" ? 10 : 1)) return +(value / unit).toPrecision(4) + name;
  return size && size < 1e-3 ? value.toExponential(2).replace(/\.?0+e/, "e") : String(+value.toPrecision(4));
}

function exact(value) {
  if (value === null) return "not a number";
  const size = Math.abs(value);
  return size && (size < 1e-3 || size >= 1e7) ? value.toExponential(3) : (+value.toPrecision(5)).toLocaleString("en");
}

document.querySelectorAll("figure[data-chart]").forEach((figure) => {
  const chart = charts[figure.dataset.chart], svg = figure.querySelector("svg"), button = figure.querySelector("button");
  const tip = figure.appendChild(Object.assign(document.createElement("div"), { className: "tip", hidden: true }));
  tip.setAttribute("role", "status");
  let isLog = false, at = null, x, y, lines = [];

  function draw() {
    lines = chart.lines.filter((line) => shown[line.run]);
    const scaled = (value) => (!isLog ? value : value > 0 ? Math.log10(value) : null);
    const every = lines.flatMap((line) => [line.points, line.mean].filter(Boolean));
    let left = Infinity, right = -Infinity, low = Infinity, high = -Infinity;
    for (const [steps, values] of every) {
      left = Math.min(left, steps[0]);
      right = Math.max(right, steps[steps.length - 1]);
      for (const value of values.map((each) => (each === null ? null : scaled(each))))
        if (value !== null) { low = Math.min(low, value); high = Math.max(high, value); }
    }
    if (!every.length) { left = 0; right = 1; }
    if (low > high) { low = 0; high = 1; }
    right = Math.max(right, left + 1);
    const pad = (high - low) * 0.05 || Math.abs(high) * 0.1 || 1;
    low -= pad;
    high += pad;
    x = (step) => box.left + ((step - left) / (right - left)) * innerWidth_;
    y = (value) => box.top + ((high - scaled(value)) / (high - low)) * innerHeight_;
    const place = (value) => box.top + ((high - value) / (high - low)) * innerHeight_;
    svg.replaceChildren();
    for (const tick of isLog ? decades(low, high) : ticks(low, high, 4)) {
      svg.append(node("path", { class: "grid", d: `M${box.left},${place(tick)}H${box.width - box.right}` }));
      svg.append(node("text", { class: "y", x: box.left - 6, y: place(tick) + 4 }, short(isLog ? 10 ** tick : tick)));
    }
    for (const tick of ticks(left, right, 4, true))
      svg.append(node("text", { class: "x", x: x(tick), y: box.height - 6 }, short(tick)));
    for (const line of lines)
      for (const [columns, kind] of [[line.points, line.mean ? "thin" : "line"], [line.mean, "line"]])
        if (columns) {
          let path = "", open = false;
          columns[0].forEach((step, i) => {
            const value = columns[1][i], is = value !== null && scaled(value) !== null;
            if (is) path += `${open ? "L" : "M"}${x(step).toFixed(1)},${y(value).toFixed(1)}${open ? "" : "h0"}`;
            open = is;
          });
          svg.append(node("path", { class: `${kind} c${line.color}${line.dashed ? " dashed" : ""}`, d: path }));
        }
    if (at !== null) point(at);
  }

  function nearest(steps, step) {
    let low = 0, high = steps.length - 1;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (steps[middle] < step) low = middle + 1; else high = middle;
    }
    return low && step - steps[low - 1] < steps[low] - step ? low - 1 : low;
  }

  function point(step) {
    svg.querySelectorAll(".cursor, circle").forEach((each) => each.remove());
    at = step;
    tip.hidden = step === null || !lines.length;
    if (tip.hidden) return;
    svg.append(node("path", { class: "cursor", d: `M${x(step)},${box.top}V${box.height - box.bottom}` }));
    const title = document.createElement("strong");
    title.textContent = `step ${step.toLocaleString("en")}`;
    tip.replaceChildren(title);
    for (const line of lines) {
      const [steps, values] = line.points, i = nearest(steps, step), row = document.createElement("div");
      const key = document.createElement("i"), name = document.createElement("span"), number = document.createElement("b");
      key.className = `key c${line.color}${line.dashed ? " dashed" : ""}`;
      name.textContent = !chart.byRun ? line.name : line.dashed ? `${runs[line.run]}, ${line.name}` : runs[line.run];
      if (steps[i] !== step) name.textContent += ` (${steps[i].toLocaleString("en")})`;
      number.textContent = exact(values[i]);
      row.append(key, name, number);
      tip.append(row);
      if (values[i] !== null && !(isLog && values[i] <= 0))
        svg.append(node("circle", { class: `c${line.color}`, cx: x(steps[i]), cy: y(values[i]), r: 3.5 }));
    }
    const drawn = svg.getBoundingClientRect(), outer = figure.getBoundingClientRect();
    const across = drawn.left - outer.left + (x(step) / box.width) * drawn.width;
    tip.style.top = `${drawn.bottom - outer.top - 4}px`;
    tip.style.left = `${Math.max(4, Math.min(across - tip.offsetWidth / 2, outer.width - tip.offsetWidth - 4))}px`;
  }

  const allSteps = () => [...new Set(lines.flatMap((line) => line.points[0]))].sort((a, b) => a - b);
  svg.addEventListener("pointermove", (event) => {
    const drawn = svg.getBoundingClientRect(), steps = allSteps();
    const inside = ((event.clientX - drawn.left) / drawn.width) * box.width;
    if (!steps.length) return;
    const first = steps[0], last = Math.max(steps[steps.length - 1], first + 1);
    point(steps[nearest(steps, first + ((inside - box.left) / innerWidth_) * (last - first))]);
  });
  svg.addEventListener("pointerleave", () => point(null));
  svg.addEventListener("blur", () => point(null));
  svg.addEventListener("keydown", (event) => {
    const steps = allSteps(), move = { ArrowLeft: -1, ArrowRight: 1, PageUp: -20, PageDown: 20, Home: -1e9, End: 1e9 }[event.key];
    if (event.key === "Escape") point(null);
    if (move === undefined || !steps.length) return;
    event.preventDefault();
    const from = at === null ? (move > 0 ? -1 : steps.length) : nearest(steps, at);
    point(steps[Math.max(0, Math.min(steps.length - 1, from + move))]);
  });
  if (button) {
    button.hidden = false;
    button.addEventListener("click", () => {
      isLog = !isLog;
      button.setAttribute("aria-pressed", isLog);
      draw();
    });
  }
  document.addEventListener("runs", draw);
  draw();
});

document.querySelectorAll("[data-run]").forEach((box_) =>
  box_.addEventListener("change", () => {
    shown[box_.dataset.run] = box_.checked;
    document.dispatchEvent(new Event("runs"));
  }),
);
