"use strict";
const { runs } = JSON.parse(document.getElementById("data").textContent);
const two = runs.length > 1;
const SIDES = ["a", "b"];
const WHOLE = new Set(["trials", "chains"]); // candidates are whole answers
const MOST = 100; // candidates shown before somebody asks for all

// Numbers that are not finite come as null, "Infinity" and "-Infinity".
const num = (value) => (value === null || value === undefined ? NaN : Number(value));
const sign = (value) => (value < 0 ? "\u2212" : "+");
function shown(value, plus = true) {
  if (Number.isNaN(value)) return "\u2013";
  const size = Math.abs(value);
  const digits = size >= 1000 ? 0 : size >= 100 ? 1 : size >= 0.01 || size === 0 ? 2 : 4;
  const text = size === Infinity ? "\u221e" : size.toFixed(digits);
  return (plus || value < 0 ? sign(value) : "") + text;
}
const percent = (share) => (share < 0.01 ? "less than 1 %" : `${Math.round(100 * share)} %`);
const counted = (count, one) => `${count.toLocaleString("en")} ${one}${count === 1 ? "" : "s"}`;
const mean = (values) => values.reduce((sum, value) => sum + value, 0) / values.length;
const finite = (values) => values.filter(Number.isFinite);
// Math.max(...values) has no room for some hundred thousand.
const least = (values) => values.reduce((low, value) => Math.min(low, value), Infinity);
const greatest = (values) => values.reduce((high, value) => Math.max(high, value), -Infinity);

function make(space, name, attributes, children) {
  const node = space ? document.createElementNS(space, name) : document.createElement(name);
  for (const [key, value] of Object.entries(attributes || {})) {
    if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
    else if (value !== undefined && value !== null && value !== false) node.setAttribute(key, value);
  }
  for (const child of children.flat()) if (child !== null && child !== undefined && child !== false) node.append(child);
  return node;
}
const h = (name, attributes, ...children) => make(null, name, attributes, children);
const s = (name, attributes, ...children) => make("http://www.w3.org/2000/svg", name, attributes, children);

// What is looked at

const said = (one) => (one.text === null ? `[${one.tokens.join(" ")}]` : one.text);
const promptOf = (answer) => answer.prompt_text ?? `[${answer.prompt_ids.join(" ")}]`;
const won = (one) => one.verdict === "accepted" || one.verdict === "fallback";
const tested = (one) => Number.isFinite(num(one.threshold));
/** Kept although it was not accepted; where nothing is tested, the best is kept as it should be. */
const fell = (one) => (one.verdict ? one.verdict === "fallback" : !one.accepted) && tested(one);
const everyCandidate = (answer) => [...answer.segments.flatMap((one) => one.candidates), ...answer.unfinished];

/** Where what is tested is no reward (a quantile), it is what is drawn and told. */
function byScore(answer) {
  return answer.loop === "segments" && everyCandidate(answer).some((one) => {
    const gap = Math.abs(num(one.score) - num(one.reward));
    return tested(one) && Number.isFinite(gap) && gap > 1e-5;
  });
}
const valueOf = (answer, one) => num(answer.byScore ? one.score : one.reward);

for (const run of runs) {
  for (const answer of run.answers) {
    answer.byScore = byScore(answer);
    answer.looked = WHOLE.has(answer.loop) || answer.loop === "population"
      ? everyCandidate(answer).filter((one) => one.verdict !== "unseen").length
      : answer.segments.reduce((sum, one) => sum + one.attempts, 0);
    answer.fallbacks = answer.segments.filter(fell).length;
    let tokens = 0;
    for (const one of answer.segments) {
      one.start = tokens;
      one.end = tokens += one.count;
      one.winner = one.candidates.find(won);
      one.level = valueOf(answer, answer.byScore && one.winner ? one.winner : one);
      if (answer.byScore && !one.winner) one.level = NaN;
    }
    answer.length = tokens;
  }
}

/** Answers of both runs to the same prompts, side by side. */
function paired() {
  const pairs = new Map();
  runs.forEach((run, side) => {
    const seen = new Map();
    for (const answer of run.answers) {
      const name = JSON.stringify([promptOf(answer), answer.sample_index]);
      const nth = seen.get(name) || 0;
      seen.set(name, nth + 1);
      const key = `${name} ${nth}`;
      if (!pairs.has(key)) pairs.set(key, [null, null]);
      pairs.get(key)[side] = answer;
    }
  });
  return [...pairs.values()].map((sides) => sides.slice(0, runs.length));
}
const items = paired();
const either = (item) => item[0] || item[1];

const state = { item: 0, side: 0, segment: [0, 0], order: items.map((_, i) => i), hit: null, all: false };

// The head and the list

function head() {
  const lines = runs.map((run, side) => {
    const { answers } = run;
    const rewards = finite(answers.map((one) => num(one.reward)));
    const segments = answers.reduce((sum, one) => sum + one.segments.length, 0);
    const errors = answers.filter((one) => one.error).length;
    const facts = [
      ["method", answers[0].method],
      ["answers", answers.length],
      ["mean reward", rewards.length ? shown(mean(rewards)) : "\u2013"],
      ["candidates a segment", (answers.reduce((sum, one) => sum + one.looked, 0) / Math.max(segments, 1)).toFixed(1)],
      ["seed", answers[0].seed ?? "\u2013"],
      errors ? ["errors", errors] : null,
    ];
    const name = two ? [h("span", { class: `mark ${SIDES[side]}` }, SIDES[side].toUpperCase()), run.name] : [run.name];
    const list = facts.filter(Boolean).map(([key, value]) => h("div", {}, h("dt", {}, key), h("dd", {}, String(value))));
    return h("div", { class: "run", title: JSON.stringify(run.settings, null, 1) }, h("h1", {}, ...name), h("dl", {}, list));
  });
  document.getElementById("head").replaceChildren(...lines);
  document.title = runs.map((run) => run.name).join(" and ");
}

/** An answer's segments in one line: how many candidates each took. */
function strip(answer) {
  const most = Math.max(greatest(answer.segments.map((one) => one.attempts)), 2);
  const bars = answer.segments.map((one, i) => {
    return s("rect", {
      x: i, width: 0.8, y: 0, height: 1, fill: fell(one) ? "var(--amber)" : "var(--blue)",
      "fill-opacity": fell(one) ? 1 : 0.18 + (0.6 * (one.attempts - 1)) / (most - 1),
    });
  });
  return s("svg", { class: "strip", viewBox: `0 0 ${Math.max(answer.segments.length, 12)} 1`, preserveAspectRatio: "none", "aria-hidden": "true" }, bars);
}

const SORTS = {
  "as in the file": () => 0,
  "lowest reward first": (item) => num(either(item).reward),
  "highest reward first": (item) => -num(either(item).reward),
  "most candidates first": (item) => -either(item).looked,
  ...(two ? { "largest difference first": (item) => (item[0] && item[1] ? -Math.abs(num(item[0].reward) - num(item[1].reward)) : 0) } : {}),
};
const FILTERS = {
  "all answers": () => true,
  "with fallbacks": (item) => item.some((answer) => answer && answer.fallbacks),
  "with errors": (item) => item.some((answer) => answer && answer.error),
};
const chosen = { sort: "as in the file", filter: "all answers" };

function choice(name, options, label) {
  const change = (event) => {
    chosen[name] = event.target.value;
    list();
    if (!state.order.includes(state.item) && state.order.length) go(state.order[0]);
  };
  return h("select", { "aria-label": label, onchange: change }, Object.keys(options).map((key) => h("option", { selected: chosen[name] === key }, key)));
}

function list() {
  const value = SORTS[chosen.sort];
  state.order = items.map((_, i) => i).filter((i) => FILTERS[chosen.filter](items[i]));
  const rank = (i) => { const own = value(items[i]); return Number.isNaN(own) ? Infinity : own; };
  state.order.sort((i, j) => rank(i) - rank(j) || i - j);
  const rows = state.order.map((i) => {
    const item = items[i];
    const figures = item.map((answer) => (answer && answer.error ? "error" : answer ? shown(num(answer.reward)) : "\u2013"));
    return h("li", {}, h("button", { type: "button", "data-item": i, "aria-current": String(i === state.item), onclick: () => go(i) },
      h("span", { class: "snippet" }, promptOf(either(item)).trim().slice(-160)),
      h("span", { class: "row" }, h("b", {}, figures.join(" / ")), strip(either(item)))));
  });
  document.getElementById("answers").replaceChildren(
    h("div", { class: "tools" }, choice("sort", SORTS, "Order"), choice("filter", FILTERS, "Which answers")),
    rows.length ? h("ol", {}, rows) : h("p", { class: "none" }, "None."));
}

// Drawings

function ticks(low, high, about) {
  const raw = (high - low) / about;
  const power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].map((m) => m * power).find((one) => one >= raw);
  const places = [];
  for (let at = Math.ceil(low / step) * step; at <= high + step / 1e6; at += step) places.push(Math.abs(at) < step / 1e6 ? 0 : at);
  return { places, digits: Math.max(0, -Math.floor(Math.log10(step) + 1e-9)) };
}

/** Values low enough to squeeze all others are drawn at the edge. */
function span(main, others) {
  const sorted = finite(others).sort((a, b) => a - b);
  const core = finite([...main, ...sorted.slice(Math.floor(sorted.length * 0.03), Math.ceil(sorted.length * 0.97))]);
  const all = core.length ? core : sorted;
  const low = least(all), high = greatest(all);
  const pad = (high - low || Math.abs(high) || 1) * 0.08;
  return [low - pad, high + pad];
}

function frame(width, height, [low, high], most, first = 0) {
  const left = 44, right = 10, top = 8, bottom = 24;
  const x = (at) => left + ((width - left - right) * at) / Math.max(most, 1);
  const y = (at) => top + ((height - top - bottom) * (high - Math.min(Math.max(at, low), high))) / (high - low);
  const levels = ticks(low, high, 4), steps = ticks(0, most, Math.max(2, Math.min(8, width / 90)));
  const marks = [
    ...levels.places.map((at) => [
      s("line", { class: "grid", x1: left, x2: width - right, y1: y(at), y2: y(at) }),
      s("text", { x: left - 7, y: y(at) + 4, "text-anchor": "end" }, `${at < 0 ? "\u2212" : ""}${Math.abs(at).toFixed(levels.digits)}`),
    ]).flat(),
    ...steps.places.filter((at) => Number.isInteger(at) && at >= first && at <= most - first).map((at) => s("text", { x: x(at), y: height - 6, "text-anchor": "middle" }, at)),
  ];
  return { x, y, marks, top, bottom: height - bottom };
}

const path = (points) => {
  let pen = false;
  return points.map(([x, y]) => {
    if (!Number.isFinite(x) || !Number.isFinite(y)) { pen = false; return ""; }
    const step = `${pen ? "L" : "M"}${x.toFixed(1)} ${y.toFixed(1)}`;
    pen = true;
    return step;
  }).join("");
};

function key(swatch, text) {
  return h("span", {}, h("i", { class: swatch }), text);
}

/** Reward against threshold by token, of one answer, or of two over one another. */
function curve(answers, width) {
  width = Math.floor(width);
  const sides = answers.map((answer, side) => ({ answer, side })).filter(({ answer }) => answer && !WHOLE.has(answer.loop));
  const levels = sides.flatMap(({ answer }) => answer.segments.map((one) => one.level));
  if (finite(levels).length < 2) return null;
  const limits = sides.flatMap(({ answer }) => answer.segments.map((one) => num(one.threshold)));
  const losers = two ? [] : sides.flatMap(({ answer }) => answer.segments.flatMap((one) => one.candidates.filter((c) => !won(c)).map((c) => valueOf(answer, c))));
  const most = greatest(sides.map(({ answer }) => answer.length));
  const height = 210, { x, y, marks, top, bottom } = frame(width, height, span([...levels, ...limits], losers), most);
  const parts = [], behind = [];
  for (const { answer, side } of sides) {
    const cls = two ? SIDES[side] : "";
    if (!two || side === state.side) behind.push(...answer.segments.map((one, i) => s("rect", {
      class: `band ${i === state.segment[side] ? "on" : ""}`, x: x(one.start), width: Math.max(x(one.end) - x(one.start), 1), y: top, height: bottom - top,
      onclick: () => pick(side, i),
    }, s("title", {}, `segment ${i + 1}: ${shown(one.level)}`))));
    const tau = answer.segments.flatMap((one) => [[x(one.start), y(num(one.threshold))], [x(one.end), y(num(one.threshold))]]
      .map(([a, b]) => [a, Number.isFinite(num(one.threshold)) ? b : NaN]));
    const dots = [];
    answer.segments.forEach((one, i) => {
      const at = x(one.end);
      if (!two) for (const c of one.candidates) {
        const value = valueOf(answer, c);
        if (!won(c) && Number.isFinite(value)) dots.push(s("circle", { class: `lost ${c.verdict}`, cx: at, cy: y(value), r: 3, onclick: () => pick(side, i) }));
      }
    });
    answer.segments.forEach((one, i) => {
      if (Number.isFinite(one.level)) dots.push(s("circle", { class: `won ${cls} ${fell(one) ? "fallback" : ""}`, cx: x(one.end), cy: y(one.level), r: 4.5, onclick: () => pick(side, i) }));
    });
    parts.push([s("path", { class: `tau ${cls}`, d: path(tau) }), s("path", { class: `line ${cls}`, d: path(answer.segments.map((one) => [x(one.end), y(one.level)])) }), dots]);
  }
  const limited = finite(limits).length > 0, name = sides.some(({ answer }) => answer.byScore) ? "quantile of the reward" : "reward";
  const keys = two
    ? sides.map(({ side }) => key(SIDES[side], SIDES[side].toUpperCase()))
    : [key("dot", "kept"), losers.length ? key("ring", "lost") : null];
  return figure(`${name}${limited ? " against threshold" : ""}, by token`, [...keys, limited ? key("dash", "threshold") : null],
    s("svg", { width, height, role: "img", "aria-label": `${name} by token` }, behind, marks, parts.flat(2)));
}

function figure(title, keys, drawing) {
  return h("figure", {}, h("figcaption", {}, h("b", {}, title[0].toUpperCase() + title.slice(1)), ...keys), h("div", { class: "scroll" }, drawing));
}

/** Whole answers in the order in which they were looked at. */
function attempts(answer, side, width) {
  const all = answer.segments.length ? answer.segments[0].candidates : answer.unfinished;
  const values = all.map((one) => num(one.reward)), limits = all.map((one) => (answer.loop === "trials" ? num(one.threshold) : NaN));
  if (finite(values).length < 2) return null;
  const height = 190, { x, y, marks } = frame(width, height, span(limits, values), all.length + 1, 1);
  const points = []; // the state of each chain, step by step
  if (answer.loop === "chains") {
    const steps = stepsOf(answer);
    let level = NaN;
    all.forEach((one, i) => {
      points.push([x(i + 1), i % steps === 0 ? NaN : y(level)]);
      if (one.verdict === "accepted") level = num(one.reward);
      points.push([x(i + 1), y(level)]);
    });
  }
  const cls = two ? SIDES[side] : "";
  return figure(answer.loop === "chains" ? "reward of each proposal" : "reward of each answer",
    [key("dot", answer.loop === "chains" ? "accepted" : "kept"), key("ring", "lost"), finite(limits).length ? key("dash", "threshold") : null],
    s("svg", { width, height, role: "img", "aria-label": "reward by attempt" }, marks,
      s("path", { class: `tau ${cls}`, d: path([[x(0), y(limits[0])], [x(all.length + 1), y(limits[0])]].map(([a, b]) => [a, Number.isFinite(limits[0]) ? b : NaN])) }),
      s("path", { class: `line ${cls}`, d: path(points) }),
      all.map((one, i) => Number.isFinite(values[i]) && s("circle", {
        class: won(one) ? `won ${cls} ${fell(one) ? "fallback" : ""}` : `lost ${one.verdict}`,
        cx: x(i + 1), cy: y(values[i]), r: won(one) ? 4.5 : 3.5, onclick: () => hit(side, i),
      }))));
}
/** Proposals of a chain; where one broke off, nobody can tell. */
const stepsOf = (answer) => (answer.error ? Infinity : everyCandidate(answer).length / ((answer.settings.method || {}).chains || 1));

/** A population: a round to the right, what continues what, and the branch that became the answer. */
function tree(answer, side, width) {
  const all = everyCandidate(answer);
  if (!all.length || all.length > 4000) return null;
  const depth = [], places = [], rounds = [];
  all.forEach((one, i) => {
    depth[i] = one.parent === null ? 0 : depth[one.parent] + 1;
    (rounds[depth[i]] ||= []).push(i);
  });
  const most = greatest(rounds.map((round) => round.length));
  const gap = Math.max(7, Math.min(20, 320 / most)), height = most * gap + 34;
  const left = 22, step = Math.min(190, Math.max(46, (width - left - 40) / Math.max(rounds.length, 1)));
  rounds.forEach((round) => {
    round.sort((i, j) => (all[i].parent === null ? 0 : places[all[i].parent] - places[all[j].parent]) || i - j);
    const first = (height - 24 - round.length * gap) / 2;
    round.forEach((i, at) => { places[i] = first + (at + 0.5) * gap; });
  });
  const at = (i) => left + step * (depth[i] + 1), rootY = (height - 24) / 2;
  const limits = rounds.map((round) => finite(round.map((i) => num(all[i].reward)))).map((own) => [least(own), greatest(own)]);
  const shade = (i) => {
    const [low, high] = limits[depth[i]], value = num(all[i].reward);
    return Number.isFinite(value) && high > low ? 0.12 + (0.88 * (value - low)) / (high - low) : 0.5;
  };
  const lineage = new Set();
  for (let i = state.hit && state.hit[0] === side ? state.hit[1] : null; i !== null && i !== undefined; i = all[i].parent) lineage.add(i);
  const branch = (i) => {
    const y0 = all[i].parent === null ? rootY : places[all[i].parent], x0 = at(i) - step, y1 = places[i], x1 = at(i), bend = step * 0.45;
    const cls = won(all[i]) ? "won" : lineage.has(i) ? "on" : "";
    return s("path", { class: `branch ${cls}`, d: `M${x0} ${y0}C${x0 + bend} ${y0} ${x1 - bend} ${y1} ${x1} ${y1}` });
  };
  const order = all.map((_, i) => i).sort((i, j) => won(all[i]) - won(all[j]) || lineage.has(i) - lineage.has(j));
  const drawing = s("svg", { width: Math.max(left + step * rounds.length + 40, 200), height, role: "img", "aria-label": "which candidate continues which" },
    order.map(branch),
    s("circle", { cx: left, cy: rootY, r: 4, fill: "var(--faint)" }),
    order.map((i) => s("circle", {
      class: `leaf ${state.hit && state.hit[0] === side && state.hit[1] === i ? "hit" : ""}`, cx: at(i), cy: places[i], r: Math.min(gap / 2 + 0.5, won(all[i]) ? 6 : 4.5),
      fill: won(all[i]) && two && side ? "var(--violet)" : "var(--blue)", "fill-opacity": won(all[i]) ? 1 : shade(i), onclick: () => leaf(side, i),
    }, s("title", {}, `${shown(num(all[i].reward))}  ${said(all[i])}`))),
    rounds.map((_, round) => s("text", { x: left + step * (round + 1), y: height - 6, "text-anchor": "middle" }, round + 1)));
  return figure("who continues whom, by round", [key("dot", "the darker, the more reward of its round")], drawing);
}

// Why a candidate lost, or did not

function why(answer, one) {
  const tau = num(one.threshold), score = num(one.score), reward = num(one.reward), beta = num(answer.beta);
  const label = { accepted: "accepted", rejected: "rejected", fallback: "kept", unseen: "unseen", error: "error" }[one.verdict];
  if (one.verdict === "error") return [label, answer.error || "it could not be drawn or scored"];
  if (one.verdict === "unseen") return [label, answer.error ? "nobody got to decide about it" : "one before it was enough"];
  switch (answer.loop) {
    case "stopping":
      return [won(one) ? "kept" : "lost", won(one)
        ? (one.verdict === "accepted" ? "the best, and good enough to stop" : "the best of all that may be drawn")
        : `another was better; then the best had to reach ${shown(tau)} for the search to end`];
    case "population":
      if (won(one)) return ["kept", "on the branch that became the answer"];
      return ["lost", everyCandidate(answer).some((other) => other.parent === one.attempt) ? "went on for a while, and its branches ended" : "was not continued"];
    case "chains":
      if (one.attempt % stepsOf(answer) === 0) return ["accepted", "where the chain begins"];
      return [label, `log ratio ${shown(score)}, ${won(one) ? "above" : "not above"} ${shown(tau)}, the log of a random number`];
    case "rsd":
      if (one.verdict === "fallback") return ["kept", "the policy wrote it anew, and it stays whatever it is"];
      return [label, `a draft whose reward is ${won(one) ? "not " : ""}below ${shown(tau)}`];
    case "persona":
      return won(one) ? ["kept", "as it was judged"] : ["lost", "as it was drafted: the judge replaced a token of it"];
    case "tokens":
      if (tau === Infinity) return won(one) ? ["kept", `the highest score, ${shown(score)}`] : ["lost", `score ${shown(score)}`];
      if (one.verdict === "fallback") return ["kept", "the network accepted none: the likeliest is taken"];
      return [label, won(one) ? "the likeliest that the network accepts" : "the network refuses it"];
  }
  if (tau === -Infinity) return [label, "taken as it comes: nothing is tested"];
  if (tau === Infinity) return won(one) ? ["kept", "the best of all"] : ["lost", "another was better"];
  if (!Number.isFinite(tau)) return [label, ""];
  const level = answer.byScore ? score : reward, chance = level >= tau ? 1 : Math.exp((level - tau) / beta);
  const told = `${answer.byScore ? `quantile ${score.toFixed(2)}, ` : ""}${shown(tau - level, false)} below the threshold`;
  if (one.verdict === "fallback") return ["kept", "none was accepted: this is the best of them"];
  if (one.verdict === "accepted") return [label, level >= tau ? "reaches the threshold" : `${told}; it had a chance of ${percent(chance)}`];
  return [label, Number.isFinite(level) ? `${told}: its chance was ${percent(chance)}` : "its reward rules it out"];
}

/** Where the value lies among the others', and the threshold. */
function meter(answer, one, [low, high], side) {
  const value = valueOf(answer, one), tau = answer.loop === "chains" ? NaN : num(one.threshold);
  if (!Number.isFinite(value) || !(high > low)) return null;
  const x = (at) => 4 + (92 * (Math.min(Math.max(at, low), high) - low)) / (high - low);
  const color = fell(one) ? "var(--amber)" : won(one) ? (side && two ? "var(--violet)" : "var(--blue)") : "var(--faint)";
  return s("svg", { class: "meter", viewBox: "0 0 100 14", preserveAspectRatio: "none", "aria-hidden": "true" },
    s("line", { x1: 4, x2: 96, y1: 7, y2: 7, stroke: "var(--rule)", "stroke-width": 2, "vector-effect": "non-scaling-stroke" }),
    Number.isFinite(tau) && s("line", { x1: x(tau), x2: x(tau), y1: 1, y2: 13, stroke: "var(--soft)", "stroke-width": 1.5, "stroke-dasharray": "3 2", "vector-effect": "non-scaling-stroke" }),
    s("line", { x1: x(value), x2: x(value), y1: 7, y2: 7, stroke: color, "stroke-width": 8, "stroke-linecap": "round", "vector-effect": "non-scaling-stroke" }));
}

function candidates(answer, side) {
  const index = state.segment[side], whole = WHOLE.has(answer.loop), segment = answer.segments[whole ? 0 : index];
  const group = segment ? segment.candidates : answer.unfinished;
  if (!group.length) return segment ? h("p", { class: "why" }, "No candidates were kept.") : null;
  const values = group.map((one) => valueOf(answer, one)), limits = group.map((one) => (answer.loop === "chains" ? NaN : num(one.threshold)));
  const range = span(limits, values);
  const place = segment && !whole ? `Segment ${index + 1} of ${answer.segments.length}, token${segment.count === 1 ? ` ${segment.end}` : `s ${segment.start + 1}\u2013${segment.end}`}` : whole ? "Whole answers" : "Where it ended";
  const seen = group.filter((one) => one.verdict !== "unseen").length, unseen = group.length - seen;
  const heading = h("h3", {}, `${place}: ${counted(seen, "candidate")}${unseen ? ` and ${unseen} that nobody looked at` : ""}`);
  const first = answer.loop === "population" && group.length ? group[0].attempt : 0;
  const rows = (state.all ? group : group.slice(0, MOST)).map((one, i) => {
    const [label, because] = why(answer, one);
    const text = said(one), touched = state.hit && state.hit[0] === side && state.hit[1] === one.attempt;
    const tree = answer.loop === "population";
    return h(tree ? "button" : "div", {
      class: `cand ${won(one) ? "won" : "lost"} ${one.verdict === "fallback" ? (fell(one) ? "fallback" : "") : one.verdict} ${touched ? "hit" : ""}`, type: tree ? "button" : null, "data-attempt": one.attempt,
      onclick: tree ? () => leaf(side, one.attempt) : () => 0, "aria-pressed": tree ? String(Boolean(touched)) : null,
    },
    h("span", { class: "who" }, h("b", {}, shown(num(one.reward))), h("em", {}, `${one.attempt - first + 1} \u00b7 ${label}`), meter(answer, one, range, side)),
    h("span", {}, h("span", { class: "says" }, text.trim() ? text.replace(/^\s*\n\s*/, "\u21b5 ").trim() : h("span", { class: "end" }, "(ends here)")),
      h("span", { class: "because" }, [because, parts(one)].filter(Boolean).join(" \u00b7 "))));
  });
  const more = !state.all && group.length > MOST && h("button", { class: "more", type: "button", onclick: () => { state.all = true; draw(); } }, `show all ${group.length}`);
  return h("section", { "aria-label": "Candidates" }, heading, rows, more);
}
const parts = (one) => (one.parts ? Object.entries(one.parts).map(([name, value]) => `${name} ${shown(num(value))}`).join(", ") : "");

// One answer

function text(answer, side, same) {
  const varied = new Set(answer.segments.map((one) => one.attempts)).size > 1;
  const spans = answer.segments.map((one, i) => {
    const label = `segment ${i + 1}, reward ${shown(num(one.reward))}, ${counted(one.attempts, "candidate")}`;
    return h("span", {
      class: `seg ${fell(one) ? "fallback" : ""} ${i < same ? "same" : ""}`, role: "button", tabindex: i === state.segment[side] ? 0 : -1, "data-segment": i,
      "aria-pressed": String(i === state.segment[side]), title: label, onclick: () => pick(side, i, true),
      onkeydown: (event) => { if (event.key === "Enter" || event.key === " ") { event.preventDefault(); pick(side, i, true); } },
    }, i ? said(one) : said(one).trimStart(), varied && one.attempts > 1 && h("sup", { "aria-hidden": "true" }, one.attempts));
  });
  if (answer.unfinished.length) {
    const i = answer.segments.length;
    spans.push(h("span", { class: "seg failed", role: "button", tabindex: 0, "data-segment": i, "aria-pressed": String(i === state.segment[side]), onclick: () => pick(side, i, true) }, " broke off here "));
  }
  return h("p", { class: "text" }, spans.length ? spans : h("span", { class: "note" }, "(empty)"));
}

function facts(answer) {
  const told = [[shown(num(answer.reward)), "reward"], [answer.length, answer.length === 1 ? "token" : "tokens"], [answer.looked, answer.looked === 1 ? "candidate" : "candidates"]];
  if (answer.fallbacks) told.push([answer.fallbacks, answer.fallbacks === 1 ? "fallback" : "fallbacks"]);
  const target = num(answer.target);
  if (Number.isFinite(target) && !answer.byScore && ["segments", "trials"].includes(answer.loop)) told.push([shown(target), "target"]);
  return h("p", { class: "facts" }, told.map(([value, name]) => h("span", {}, h("b", {}, String(value)), ` ${name}`)), h("span", {}, `ended by ${answer.finish_reason}`));
}

function column(answer, side, width, same) {
  const mark = two && h("span", { class: `mark ${SIDES[side]}` }, SIDES[side].toUpperCase());
  if (!answer) return h("article", { class: SIDES[side] }, h("p", { class: "note" }, mark, "no answer to this prompt"));
  const line = facts(answer);
  if (mark) line.prepend(mark);
  const drawing = answer.loop === "population" ? tree(answer, side, width) : WHOLE.has(answer.loop) ? attempts(answer, side, width) : null;
  return h("article", { class: SIDES[side] }, line,
    answer.error && h("p", { class: "error", role: "alert" }, answer.error),
    text(answer, side, same), !two && curve([answer], width), drawing, candidates(answer, side));
}

function draw() {
  const main = document.getElementById("main"), item = items[state.item];
  main.className = two ? "two" : "";
  const style = getComputedStyle(main), rem = parseFloat(getComputedStyle(document.documentElement).fontSize);
  const stacked = window.matchMedia("(max-width: 820px)").matches;
  const room = Math.max(240, Math.min(main.clientWidth - parseFloat(style.paddingLeft) - parseFloat(style.paddingRight), (two ? 82 : 58) * rem));
  const width = Math.floor(two && !stacked ? (room - 40) / 2 : room);
  let same = 0;
  if (two && item[0] && item[1]) {
    const [a, b] = item.map((answer) => answer.segments.map(said));
    while (same < Math.min(a.length, b.length) && a[same] === b[same]) same += 1;
  }
  const prompt = promptOf(either(item));
  const note = two && same > 0 && h("p", { class: "note" }, item.every((answer) => same === answer.segments.length) ? "Both texts are the same." : `The first ${counted(same, "segment")} are the same.`);
  main.replaceChildren(
    h("p", { class: `prompt ${prompt.length > 900 ? "long" : ""}` }, prompt), note || "",
    two ? curve(item, room) || "" : "",
    h("div", { class: "columns" }, item.map((answer, side) => column(answer, side, width, same))));
}

// Going about

function busiest(answer) {
  if (!answer) return 0;
  if (answer.unfinished.length) return answer.segments.length;
  const most = greatest(answer.segments.map((one) => one.attempts));
  return Math.max(0, answer.segments.findIndex((one) => one.attempts === most));
}

function remember() {
  try { history.replaceState(null, "", `#${state.item + 1}.${state.segment[state.side] + 1}${two ? SIDES[state.side] : ""}`); } catch { /* a page without an address */ }
}

function go(i, segment = null, side = 0) {
  Object.assign(state, { item: i, side, hit: null, all: false, segment: items[i].map(busiest) });
  if (!items[i][side]) state.side = 1 - side;
  if (segment !== null) state.segment[state.side] = segment;
  for (const button of document.querySelectorAll("[data-item]")) button.setAttribute("aria-current", String(Number(button.dataset.item) === i));
  draw();
  remember();
}

function pick(side, i, focus = false) {
  state.side = side;
  state.segment[side] = i;
  Object.assign(state, { hit: null, all: false });
  draw();
  remember();
  if (focus) document.querySelectorAll("article")[side].querySelector(`[data-segment="${i}"]`)?.focus({ preventScroll: true });
}

function hit(side, attempt) {
  state.side = side;
  state.hit = [side, attempt];
  draw();
  const row = document.querySelectorAll("article")[side].querySelector(`[data-attempt="${attempt}"]`);
  row?.focus({ preventScroll: true });
  row?.scrollIntoView({ block: "nearest" });
}

/** A candidate of a population: its round is the segment, or the last one where the answer had ended by then. */
function leaf(side, attempt) {
  const { segments } = items[state.item][side];
  state.segment[side] = Math.max(0, segments.findIndex((one) => one.candidates.some((c) => c.attempt === attempt)));
  hit(side, attempt);
}

document.addEventListener("keydown", (event) => {
  if (event.altKey || event.ctrlKey || event.metaKey || event.target.closest("select, input")) return;
  const answer = items[state.item][state.side], at = state.order.indexOf(state.item);
  const count = answer ? answer.segments.length + (answer.unfinished.length ? 1 : 0) : 0;
  const move = { ArrowLeft: -1, ArrowRight: 1 }[event.key], step = { k: -1, j: 1 }[event.key];
  if (move && count) {
    event.preventDefault();
    pick(state.side, Math.min(Math.max(state.segment[state.side] + move, 0), count - 1), true);
  } else if (step && state.order[at + step] !== undefined) {
    go(state.order[at + step]);
    document.querySelector('[aria-current="true"]')?.scrollIntoView({ block: "nearest" });
  }
});

const dark = window.matchMedia("(prefers-color-scheme: dark)");
const theme = (name) => document.documentElement.setAttribute("data-theme", name);
theme(dark.matches ? "dark" : "light");
dark.addEventListener("change", () => theme(dark.matches ? "dark" : "light"));
document.getElementById("theme").addEventListener("click", () => theme(document.documentElement.dataset.theme === "dark" ? "light" : "dark"));

let width = window.innerWidth;
window.addEventListener("resize", () => { if (window.innerWidth !== width) { width = window.innerWidth; draw(); } });

function fromAddress() {
  const asked = /^#(\d+)(?:\.(\d+)([ab])?)?$/.exec(location.hash);
  const i = asked ? Math.min(Math.max(Number(asked[1]) - 1, 0), items.length - 1) : 0;
  go(i, asked && asked[2] ? Math.max(Number(asked[2]) - 1, 0) : null, asked && asked[3] === "b" && two ? 1 : 0);
}
window.addEventListener("hashchange", fromAddress);

document.getElementById("layout").classList.toggle("single", items.length === 1);
document.querySelector(".several").hidden = items.length === 1;
head();
list();
fromAddress();
