// Draws what /events tells. Names come from other machines: they are only ever put in as text.
"use strict";

const SVG = "http://www.w3.org/2000/svg";
const SAMPLES = 300;
/** A chart is as wide as that from the beginning. */
const FIRST_SAMPLES = 60;
const MOST_DRAWN = 24;
const RETRY_MS = 2000;
const at = (id) => document.getElementById(id);

/** Totals so far -> rates: what the newest two say, for each name. */
const before = { at_s: 0, totals: new Map() };
const history = [];

function make(tag, attributes = {}, text = "") {
  return dress(document.createElement(tag), attributes, text);
}

function draw(tag, attributes = {}, text = "") {
  return dress(document.createElementNS(SVG, tag), attributes, text);
}

function dress(element, attributes, text) {
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  if (text !== "") element.textContent = text;
  return element;
}

function scaled(value, units, step) {
  let unit = 0;
  while (value >= step && unit < units.length - 1) { value /= step; unit += 1; }
  return `${value >= 100 || value === 0 ? value.toFixed(0) : value.toFixed(1)} ${units[unit]}`;
}
const bits = (bytes) => scaled(bytes * 8, ["bit/s", "kbit/s", "Mbit/s", "Gbit/s"], 1000);
const bytes = (count) => scaled(count, ["B", "KiB", "MiB", "GiB", "TiB"], 1024);
const millis = (ms) => (ms === null ? "" : ms < 10 ? `${ms.toFixed(1)} ms` : `${ms.toFixed(0)} ms`);

function span(seconds) {
  const units = [["d", 86400], ["h", 3600], ["m", 60], ["s", 1]];
  const first = units.findIndex(([, length]) => seconds >= length);
  if (first < 0) return "0 s";
  return units.slice(first, first + 2).map(([unit, length], place, shown) => {
    const value = Math.floor(place ? (seconds % shown[0][1]) / length : seconds / length);
    return `${value} ${unit}`;
  }).join(" ");
}

/** Per second since the last snapshot; 0 for what is new, or began again. */
function rates(shown) {
  const passed_s = shown.at_s - before.at_s;
  const totals = new Map();
  const rate = (name, total) => {
    totals.set(name, total);
    const last = before.totals.get(name);
    return last === undefined || passed_s <= 0 || total < last ? 0 : (total - last) / passed_s;
  };
  const found = {
    out: rate("out", shown.out_bytes),
    in: rate("in", shown.in_bytes),
    drops: rate("drops", Object.values(shown.drops).reduce((sum, each) => sum + each.count, 0)),
    peers: new Map(shown.peers.map((peer) => [peer.id, {
      out: rate(`to ${peer.id}`, peer.sent), in: rate(`from ${peer.id}`, peer.received),
    }])),
    shards: new Map(shown.shards.map((shard) => [shard.index,
      rate(`shard ${shard.index}`, shard.sent + shard.received)])),
  };
  if (passed_s < 0) history.length = 0; // another life of the node
  before.at_s = shown.at_s;
  before.totals = totals;
  if (passed_s > 0 && passed_s < 120) history.push({ at_s: shown.at_s, out: found.out, in: found.in, drops: found.drops });
  if (history.length > SAMPLES) history.shift();
  return found;
}

function showHead(shown) {
  document.title = `${shown.name}: ${shown.health}`;
  at("name").textContent = shown.name;
  dress(at("health"), { class: `badge ${shown.health}` }, shown.health);
  at("about").textContent = `${shown.addresses.join(", ")} · ${shown.about} · up ${span(shown.at_s)} · vpnd ${shown.version}`;
  at("connected").textContent = shown.connected;
  at("ailments").replaceChildren(...shown.ailments.map(({ what, remedy }) =>
    make("li", {}, remedy ? `${what}: ${remedy}` : what)));
  at("warnings").replaceChildren(...shown.warnings.map((line) => make("li", {}, line)));
}

function showMesh(shown, rate) {
  const svg = at("mesh");
  const narrow = svg.clientWidth > 0 && svg.clientWidth < 520;
  const drawn = shown.peers.slice(0, MOST_DRAWN);
  const flat = drawn.length <= 2;
  const [width, height] = [narrow ? 400 : 640, flat ? 150 : narrow ? 420 : 400];
  svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
  const centre = [width / 2, height / 2];
  const places = new Map(drawn.map((peer, number) => {
    const angle = (2 * Math.PI * number) / drawn.length - Math.PI / (flat ? 1 : 2);
    const far = drawn.length > 12 && number % 2 ? 0.72 : 1;
    return [peer.id, [centre[0] + far * (width / 2 - 75) * Math.cos(angle), centre[1] + far * (height / 2 - 58) * Math.sin(angle)]];
  }));
  const byName = new Map(drawn.map((peer) => [peer.name, places.get(peer.id)]));
  const lines = [], nodes = [];
  for (const peer of drawn) {
    const [x, y] = places.get(peer.id);
    const kind = peer.kind || "away";
    const traffic = rate.peers.get(peer.id).out + rate.peers.get(peer.id).in;
    const thick = kind === "away" ? 2 : 2 + Math.min(6, Math.log10(1 + traffic / 1e4) * 1.5);
    const relay = kind === "relayed" ? byName.get(peer.via) : undefined;
    const corners = relay ? [centre, relay, [x, y]] : [centre, [x, y]];
    for (let corner = 1; corner < corners.length; corner += 1) {
      const [[x1, y1], [x2, y2]] = [corners[corner - 1], corners[corner]];
      lines.push(draw("line", { x1, y1, x2, y2, class: kind, "stroke-width": thick }));
    }
    const [fromX, fromY] = corners[corners.length - 2];
    const [middleX, middleY] = [0.55 * x + 0.45 * fromX, 0.55 * y + 0.45 * fromY];
    const above = kind === "away" ? peer.state
      : [millis(peer.rtt_ms), peer.via && !relay ? `via ${peer.via}` : ""].filter(Boolean).join(" ");
    lines.push(draw("text", { x: middleX, y: middleY - 8, class: "label" }, above));
    if (traffic > 1000) lines.push(draw("text", { x: middleX, y: middleY + 18, class: "label" }, bits(traffic)));
    nodes.push(draw("circle", { cx: x, cy: y, r: 12, class: kind }));
    nodes.push(draw("text", { x, y: y + 28 }, peer.name), draw("text", { x, y: y + 42, class: "ip" }, peer.ip));
  }
  nodes.push(draw("circle", { cx: centre[0], cy: centre[1], r: 16, class: "me" }));
  nodes.push(draw("text", { x: centre[0], y: centre[1] + 33 }, shown.name));
  if (shown.known > drawn.length) {
    nodes.push(draw("text", { x: width - 60, y: height - 8, class: "ip" }, `and ${shown.known - drawn.length} more below`));
  }
  svg.replaceChildren(...lines, ...nodes);
}

function chart(id, names, show) {
  const top = Math.max(1, ...history.flatMap((sample) => names.map((name) => sample[name])));
  const paths = names.map((name) => {
    const points = history.map((sample, number) => {
      const x = 300 - (history.length - 1 - number) * (300 / (Math.max(history.length, FIRST_SAMPLES) - 1));
      return `${x.toFixed(1)},${(116 - (110 * sample[name]) / top).toFixed(1)}`;
    });
    return draw("path", { class: name === "drops" ? "bad" : name, d: points.length ? `M${points.join("L")}` : "" });
  });
  at(id).replaceChildren(...paths);
  at(`${id}-top`).textContent = `top ${show(top)}`;
  at(`${id}-span`).textContent = span(history.length ? history[history.length - 1].at_s - history[0].at_s : 0);
}

function table(id, heads, rows) {
  const cell = (tag, value, numeric, extra = "") => {
    const element = make(tag, { class: `${numeric ? "number" : ""} ${extra}`.trim() });
    if (value instanceof Node) element.append(value); else element.textContent = value;
    return element;
  };
  const head = make("tr");
  head.append(...heads.map(([name, numeric, extra]) => cell("th", name, numeric, extra)));
  at(id).replaceChildren(...(rows.length ? [head] : []), ...rows.map((row) => {
    const line = make("tr");
    line.append(...row.map((value, place) => cell("td", value, heads[place][1], heads[place][2])));
    return line;
  }));
}

function showTables(shown, rate) {
  table("peers", [["peer"], ["address"], ["path"], ["round trip", true], ["↑", true], ["↓", true], ["dropped", true], ["why not", false, "wordy"]],
    shown.peers.map((peer) => {
      const state = make("span", { class: peer.state === "connected" ? "connected" : "notyet" },
        peer.kind ? (peer.via ? `relayed via ${peer.via}` : peer.kind) : peer.state);
      const seen = peer.seen_s < 0 ? "" : `last seen ${span(peer.seen_s)} ago`;
      const why = [seen, peer.why, peer.circuit === "closed" ? "" : `circuit ${peer.circuit}`,
        peer.suspect ? `suspect sessions: ${peer.suspect} of ${peer.sessions}` : ""].filter(Boolean).join("; ");
      const { out, in: inward } = rate.peers.get(peer.id);
      return [peer.name, peer.ip, state, millis(peer.rtt_ms), bits(out), bits(inward), peer.drops || "", why];
    }));
  const meter = (share) => make("meter", { min: 0, max: 1, high: 0.8, value: Math.min(1, share) });
  table("shards", [["process"], ["CPU", true], ["ring"], ["flows", true], ["traffic", true]], [
    ...shown.shards.map((shard) => [
      `shard ${shard.index}${shard.state === "up" ? "" : ` (${shard.state})`}${shard.restarts ? `, restarted ${shard.restarts}×` : ""}`,
      `${shard.cpu.toFixed(0)} %`, meter(shard.ring), shard.flows, bits(rate.shards.get(shard.index))]),
    ...shown.processes.map((process) => [process.name, `${process.cpu.toFixed(0)} %`, "", "", bytes(process.rss)]),
  ]);
  const drops = Object.entries(shown.drops).sort(([, one], [, other]) => other.count - one.count).slice(0, 6);
  table("drops", [["reason"], ["records", true]], drops.map(([reason, { count, meaning }]) =>
    [make("span", { title: meaning }, reason), count]));
}

function show(shown) {
  const rate = rates(shown);
  showHead(shown);
  showMesh(shown, rate);
  at("out").textContent = bits(rate.out);
  at("in").textContent = bits(rate.in);
  at("drop-rate").parentElement.className = rate.drops ? "bad" : "calm";
  at("drop-rate").textContent = rate.drops ? `${rate.drops.toFixed(1)} a second` : "none now";
  chart("traffic", ["out", "in"], bits);
  chart("dropped", ["drops"], (top) => `${top.toFixed(0)} a second`);
  showTables(shown, rate);
}

function notice(text) {
  at("notice").textContent = text;
  at("notice").hidden = !text;
}

/** EventSource sends no header, so the stream is read by hand: lines "data: JSON". */
async function listen(token) {
  const answer = await fetch("events", { headers: { Authorization: `Bearer ${token}` }, cache: "no-store" });
  if (answer.status === 401) {
    notice("This page needs its token: open the address that `vpnd page` prints on the machine.");
    return false;
  }
  if (!answer.ok) throw new Error(`HTTP ${answer.status}`);
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return true;
    text += value;
    const lines = text.split("\n");
    text = lines.pop();
    for (const line of lines) {
      if (!line.startsWith("data: ")) continue;
      const shown = JSON.parse(line.slice(6));
      notice(shown ? "" : "The daemon does not answer.");
      if (shown) show(shown);
    }
  }
}

/** Keeps the token for this tab only, and out of the address, so that it is not copied along with it. */
function takeToken() {
  if (location.hash.length < 2) return;
  sessionStorage.setItem("token", location.hash.slice(1));
  window.history.replaceState(null, "", location.pathname);
}

async function main() {
  takeToken();
  // the address with the token, given to a page that is open already, loads nothing by itself
  window.addEventListener("hashchange", () => { takeToken(); location.reload(); });
  let again = true;
  while (again) {
    try {
      again = await listen(sessionStorage.getItem("token") || "");
    } catch (error) {
      notice("The node does not answer; trying again.");
    }
    if (again) await new Promise((done) => setTimeout(done, RETRY_MS));
  }
}

main();
