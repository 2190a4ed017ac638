"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const overview = document.getElementById("overview");
const detail = document.getElementById("detail");
const FILTERS = ["task", "format", "verdict", "gpu", "checkpoint"];
const NIGHTS_SHOWN = 30;

// Elements: text is always set as text, so that no name becomes markup.
function make(tag, attributes = {}, ...children) {
  const svg = ["svg", "polyline", "polygon", "line", "circle", "rect", "text", "g"].includes(tag);
  const made = svg ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) if (value !== null) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

function number(value) {
  if (value === null || value === undefined) return "n/a";
  if (value === 0) return "0";
  const size = Math.abs(value);
  if (size >= 1e-3 && size < 1e4) return String(Number(value.toPrecision(3)));
  return value.toExponential(2).replace(/e([+-])(\d)$/, "e$10$2");
}

const shown = (series, value) => value === null ? "n/a" : series.kind === "score" ? `${(100 * value).toFixed(1)}%` : number(value);
const day = run => run[1].slice(0, 10);
const commit = run => run[2] === null ? "unknown" : run[2].slice(0, 8) + (run[2].endsWith("-dirty") ? "-dirty" : "");
const report = (run, part) => `reports/${encodeURIComponent(run[3])}${part ? `#${part}` : ""}`;
const nightOf = (tile, place) => data.runs[tile.nights[place]];

function filter() {
  const chosen = Object.fromEntries(FILTERS.map(key => [key, document.getElementById(key).value]));
  let count = 0;
  for (const tile of document.querySelectorAll(".tile")) {
    let scored = !chosen.task;
    for (const row of tile.querySelectorAll("tr[data-series]")) {
      const here = !chosen.task || row.dataset.series === chosen.task;
      row.hidden = !here && row.dataset.kind === "score";
      scored ||= here;
    }
    tile.hidden = !scored || FILTERS.slice(1).some(key => chosen[key] && tile.dataset[key] !== chosen[key]);
    count += !tile.hidden;
  }
  for (const group of document.querySelectorAll(".group")) group.hidden = !group.querySelector(".tile:not([hidden])");
  const all = document.querySelectorAll(".tile").length;
  document.getElementById("shown").textContent = count === all ? `${all} candidates` : `${count} of ${all} candidates`;
}

// Round values between two: of 1, 2, 5 times a power of ten, and of every two digits where those are too far apart.
function ticks(low, high, log) {
  if (log) {
    const found = [];
    for (const digits of [[1, 2, 5], [1, 1.5, 2, 2.5, 3, 4, 5, 6, 7, 8, 9]]) {
      found.length = 0;
      for (let power = Math.floor(low); power <= high; power++) {
        for (const digit of digits) {
          const value = power + Math.log10(digit);
          if (value > low && value < high) found.push(value);
        }
      }
      if (found.length > 2) break;
    }
    return found.length > 9 ? found.filter(value => Number.isInteger(value)) : found;
  }
  const step = [0.5, 1, 2, 5, 10, 20].find(step => (high - low) / step <= 5) || 25;
  return Array.from({ length: Math.floor((high - low) / step) + 2 }, (_, i) => (Math.ceil(low / step) + i) * step).filter(value => value < high);
}

// A series over nights, drawn at the width it has; `levels` are [first, end, value].
function chart(tile, series, height = 190) {
  const figure = make("figure", { class: "chart" });
  const reading = make("div", { class: "reading" });
  figure.append(make("figcaption", {}, make("strong", {}, series.name), series.unit === "%" ? "" : `, ${series.unit}`), make("div"), reading);
  figure.draw = () => {
    const width = Math.max(figure.clientWidth, 240);
    const [left, right, top, bottom] = [62, 8, 10, 24];
    const log = series.kind === "error";
    const usable = v => v !== null && v !== undefined && (!log || v > 0);
    const scale = log ? Math.log10 : v => 100 * v;
    const bounds = [series.values, series.lower, series.upper].filter(Boolean).flat().filter(usable).map(scale);
    if (!bounds.length) { figure.children[1].textContent = "0 throughout"; return; }
    let low = Infinity, high = -Infinity;
    for (const v of bounds) { low = Math.min(low, v); high = Math.max(high, v); }
    const pad = Math.max((log ? 0.18 : 4) - (high - low), 0) / 2 + 0.06 * (high - low);
    [low, high] = [low - pad, high + pad];
    if (!log) [low, high] = [Math.max(low, -1), Math.min(high, 101)];
    const steps = Math.max(series.values.length - 1, 1);
    const x = i => left + (width - left - right) * i / steps;
    const y = v => top + (height - top - bottom) * (high - scale(v)) / (high - low);
    const svg = make("svg", { viewBox: `0 0 ${width} ${height}`, height, role: "img",
      "aria-label": `${series.name} over ${series.values.length} runs; the table of runs holds the same numbers` });
    for (const value of ticks(low, high, log)) {
      const place = top + (height - top - bottom) * (high - value) / (high - low);
      svg.append(make("line", { class: "grid", x1: left, x2: width - right, y1: place, y2: place }),
        make("text", { x: left - 6, y: place + 4, "text-anchor": "end" }, log ? number(10 ** value) : `${Number(value.toFixed(1))}%`));
    }
    svg.append(make("text", { x: left, y: height - 6 }, day(nightOf(tile, 0))),
      make("text", { x: width - right, y: height - 6, "text-anchor": "end" }, day(nightOf(tile, series.values.length - 1))));
    const places = series.values.map((v, i) => i).filter(i => usable(series.values[i]));
    if (series.lower && series.upper) {
      const known = places.filter(i => usable(series.lower[i]) && usable(series.upper[i]));
      svg.append(make("polygon", { class: "band", points: [...known.map(i => `${x(i)},${y(series.upper[i])}`),
        ...known.reverse().map(i => `${x(i)},${y(series.lower[i])}`)].join(" ") }));
    }
    svg.append(make("polyline", { points: places.map(i => `${x(i)},${y(series.values[i])}`).join(" ") }));
    const starts = [0, ...series.changes.map(change => change[0])];
    const ends = [...series.changes.map(change => change[0]), series.values.length];
    series.changes.forEach(([at, , before, after], place) => {
      const worse = (after < before) === (series.kind === "score");
      svg.append(make("line", { class: `mark ${worse ? "worse" : "better"}`, x1: x(at - 0.5), x2: x(at - 0.5), y1: top, y2: height - bottom }));
      if (place === 0 && usable(before)) level(starts[0], ends[0], before);
      if (usable(after)) level(starts[place + 1], ends[place + 1], after);
    });
    function level(from, to, value) {
      svg.append(make("line", { class: "level", x1: x(from), x2: x(to - 1), y1: y(value), y2: y(value) }));
    }
    const dot = make("circle", { r: 4 });
    const last = places.at(-1);
    const point = i => {
      dot.setAttribute("cx", x(i)); dot.setAttribute("cy", y(series.values[i]));
      const run = nightOf(tile, i);
      const interval = series.lower && series.lower[i] !== null ? ` [${shown(series, series.lower[i])}, ${shown(series, series.upper[i])}]` : "";
      const n = series.n && series.n[i] ? `, n = ${series.n[i].toLocaleString("en")}` : "";
      reading.textContent = `${day(run)}: ${shown(series, series.values[i])}${interval}${n}, commit ${commit(run)}`;
    };
    svg.append(dot);
    svg.addEventListener("pointermove", event => {
      const box = svg.getBoundingClientRect();
      const at = (event.clientX - box.left) * width / box.width;
      point(places.reduce((best, i) => Math.abs(x(i) - at) < Math.abs(x(best) - at) ? i : best, last));
    });
    svg.addEventListener("pointerleave", () => point(last));
    point(last);
    figure.children[1].replaceChildren(svg);
  };
  return figure;
}

function table(columns, rows, texts = 1) {
  const cells = (tag, row) => row.map((cell, i) => {
    const made = make(tag, { class: i < texts ? "text" : null });
    made.append(cell);
    return made;
  });
  return make("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": `${columns[0]}, table` },
    make("table", {}, make("thead", {}, make("tr", {}, ...cells("th", columns))),
      make("tbody", {}, ...rows.map(row => make("tr", {}, ...cells("td", row))))));
}

// Which layers moved: each one's error before and after, and on request its own trend.
function layersOf(tile, event) {
  const part = make("div", { class: "layers" });
  const first = nightOf(tile, event.at), before = nightOf(tile, event.at - 1);
  for (const mode of ["isolated", "propagated"]) {
    const moved = event.layers[mode];
    if (!moved || !moved.length) continue;
    const most = moved.reduce((most, [, a, b]) => Math.max(most, a, b), 0) || 1;
    const trend = make("div", { class: "trend" });
    const rows = moved.map(([layer, was, is]) => {
      const button = make("button", { class: "layer", type: "button", "data-layer": layer, "data-mode": mode }, `layer ${layer}`);
      button.addEventListener("click", () => {
        const place = tile.layers[mode].layers.indexOf(layer);
        const series = { name: `layer ${layer}, attention error, ${mode}`, kind: "error", unit: "relative L2", values: tile.layers[mode].values[place],
          lower: null, upper: null, n: null, changes: [[event.at, event.found, was, is]] };
        const figure = chart(tile, series);
        trend.replaceChildren(figure, make("p", {}, make("a", { class: "at-layers", href: report(first, "layers") }, `Report of ${day(first)}, at its layers`), " · ",
          make("a", { href: report(before, "layers") }, `of ${day(before)}, the run before`)));
        figure.draw();
        trend.scrollIntoView({ block: "nearest" });
      });
      const bars = make("svg", { viewBox: "0 0 100 16", preserveAspectRatio: "none", "aria-hidden": "true" },
        make("rect", { class: "before", x: 0, y: 1, width: 100 * was / most, height: 6 }),
        make("rect", { class: "after", x: 0, y: 8, width: 100 * is / most, height: 6 }));
      return [button, number(was), number(is), was > 0 ? `×${number(is / was)}` : "from 0", bars];
    });
    const made = table([mode === "isolated" ? "isolated" : "propagated", "before", "after", "ratio", ""], rows);
    made.querySelectorAll("tbody tr").forEach((row, i) => {
      row.lastElementChild.className = "bar";
      if (mode === "isolated" && moved[i][0] === event.guilty) row.className = "guilty";
    });
    const short = made.querySelectorAll("tbody tr");
    if (short.length > 8) {
      const more = make("button", { type: "button" }, `all ${short.length} layers`);
      short.forEach((row, i) => { row.hidden = i >= 8; });
      more.addEventListener("click", () => { short.forEach(row => { row.hidden = false; }); more.remove(); });
      part.append(made, more, trend);
    } else part.append(made, trend);
  }
  return part;
}

function eventCard(tile, event, open) {
  const first = nightOf(tile, event.at), known = nightOf(tile, event.found), before = nightOf(tile, event.at - 1);
  const title = make("h3", {}, `${day(first)}: `);
  event.what.forEach(([series, change, direction], i) =>
    title.append(i ? ", " : "", `${tile.series[series].name} `, make("span", { class: direction }, change)));
  const isolated = (event.layers.isolated || []).find(row => row[0] === event.guilty);
  const card = make("article", { class: "event" }, title,
    make("p", { class: "small" }, "Between ", make("code", {}, event.before), ` (${day(before)}) and `, make("code", {}, event.after),
      ` (${day(first)}); known since ${day(known)}, with ${event.found - event.at + 1} runs.`));
  if (event.commits.length) card.append(make("ul", { class: "small commits" }, ...event.commits.map(line => make("li", {}, line))));
  if (event.packages.length) card.append(make("p", { class: "small" }, `Packages: ${event.packages.join(", ")}.`));
  card.append(make("p", { class: "small blame" }, isolated
    ? `Layer ${event.guilty} moved most on the reference's own input: ${number(isolated[1])} → ${number(isolated[2])}.`
    : "No layer's attention error on the reference's own input moved by 5 %: rows and kernel are as they were; see tasks, sampling and packages."));
  const part = make("details", {}, make("summary", {}, "Layers before and after"));
  part.open = open;
  const fill = () => { if (part.open && part.children.length === 1) part.append(layersOf(tile, event)); };
  part.addEventListener("toggle", fill);
  fill();
  card.append(part);
  return card;
}

function runsOf(tile) {
  const rows = tile.nights.map((place, i) => {
    const run = data.runs[place];
    return [make("a", { href: report(run) }, day(run)), commit(run), tile.verdicts[i] || "not judged", ...tile.series.map(series => shown(series, series.values[i]))];
  }).reverse();
  const columns = ["run", "commit", "verdict", ...tile.series.map(series => series.name)];
  const part = make("div", { id: "runs" }, make("h2", {}, `Runs (${rows.length})`));
  const show = count => part.replaceChildren(part.firstChild, table(columns, rows.slice(0, count), 3), ...(count < rows.length ? [more] : []));
  const more = make("button", { type: "button" }, `all ${rows.length} runs`);
  more.addEventListener("click", () => show(rows.length));
  show(NIGHTS_SHOWN);
  return part;
}

function open(tile) {
  const verdict = tile.verdicts.at(-1) || "not judged";
  const back = make("a", { href: "#" }, "← all candidates");
  const figures = tile.series.map(series => chart(tile, series));
  const events = tile.events.map((event, i) => eventCard(tile, event, i === tile.events.length - 1)).reverse();
  detail.replaceChildren(make("nav", { class: "small" }, back), make("h2", {}, tile.candidate),
    make("p", { class: "quiet small" }, `${tile.where}; ${tile.bytes.toLocaleString("en")} bytes a token.`),
    make("p", {}, make("strong", { class: verdict.split(" ")[0] }, verdict), tile.post_hoc ? " (post hoc)" : "", tile.policy ? ` under ${tile.policy}. ` : ". ", tile.reason),
    make("h2", {}, "What changed"),
    ...(events.length ? events : [make("p", { class: "quiet" }, `Nothing moved by more than nights differ, in ${tile.nights.length} runs.`)]),
    make("h2", {}, "Trends"), make("div", { class: "charts" }, ...figures), runsOf(tile));
  figures.forEach(figure => figure.draw());
}

function route() {
  const found = location.hash.match(/^#t(\d+)$/);
  const tile = found ? data.tiles[Number(found[1])] : undefined;
  const left = detail.dataset.tile;
  detail.hidden = !tile;
  overview.hidden = Boolean(tile);
  if (tile) {
    open(tile);
    detail.dataset.tile = found[1];
    scrollTo(0, 0);
    detail.focus({ preventScroll: true });
  } else if (left) {
    delete detail.dataset.tile;
    detail.replaceChildren();
    document.querySelector(`#tile-t${left} a`)?.focus();
  }
}

// A page that was written in time may be read too late.
const age = (Date.now() - Date.parse(data.newest)) / 3.6e6;
const alerts = document.getElementById("alerts");
if (data.expected_h && age > data.expected_h && !alerts.textContent.includes("Missing:")) {
  alerts.classList.add("raised");
  alerts.querySelector(".none")?.remove();
  alerts.append(make("p", { id: "stale" }, `Missing: the newest run on this page started ${Math.round(age)} h ago; one is expected every ${data.expected_h} h.`));
}

for (const key of FILTERS) document.getElementById(key).addEventListener("change", filter);
filter();
addEventListener("hashchange", route);
route();
let resized;
addEventListener("resize", () => {
  clearTimeout(resized);
  resized = setTimeout(() => document.querySelectorAll(".chart").forEach(figure => figure.draw()), 120);
});
addEventListener("keydown", event => { if (event.key === "Escape" && location.hash) location.hash = ""; });
