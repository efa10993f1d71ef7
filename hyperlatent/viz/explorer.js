// The explorer's page. `mount` draws; it is given a `link` to a kernel, or to what a kernel has computed before (the kernel-free page).
// Okabe and Ito's palette without its yellow and black, and the cividis colour map: readable with any colour vision.
const BRIGHT = ["#4FA8E8", "#F0B030", "#2CC79A", "#E39AC4", "#8FD3F7", "#FF8A4A", "#B5B5B5"]; // the same on a dark page
const KINDS = ["#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#8C8C8C"];
const SHAPES = ["disc", "square", "triangle", "diamond", "cross", "disc", "square"];
const CIVIDIS = [[0, 34, 78], [18, 53, 112], [59, 73, 108], [87, 93, 109], [112, 113, 115], [138, 134, 120], [165, 156, 116], [195, 179, 105], [225, 204, 85], [254, 232, 56]];
const SCALES = Array.from({ length: 41 }, (_, i) => i / 4);
const DEFAULTS = { question: "", negative_question: "", method: "classifier-free", guidance_scale: 1.5, num_inference_steps: 25,
  sampler: "ddim", prior_weight: 0.01, chains: 32, seed: 0, projection: "pca" };

function cividis(x) {
  const t = Math.min(0.9999, Math.max(0, x)) * (CIVIDIS.length - 1), i = Math.floor(t), f = t - i;
  return `rgb(${CIVIDIS[i].map((c, k) => Math.round(c + f * (CIVIDIS[i + 1][k] - c))).join(",")})`;
}

const percent = x => `${Math.round(100 * x)} %`;
const keyOf = s => JSON.stringify(Object.keys(DEFAULTS).filter(n => n !== "guidance_scale").map(n => s[n]));

function element(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name in node && name !== "list" && name !== "for") node[name] = value; else node.setAttribute(name, value);
  }
  node.append(...children);
  return node;
}

let count = 0;

export function mount(el, link) {
  const id = `hl${++count}`, root = element("section", { className: "hl-explorer" });
  root.setAttribute("aria-label", "Guidance explorer");
  el.append(root);
  // JupyterLab takes arrow keys and letters from controls inside its cells
  root.addEventListener("keydown", event => event.stopPropagation());
  const state = { ...DEFAULTS, ...link.settings }, sweeps = new Map();
  let scene = null, asked = null, land = null, ghost = null, hover = -1, pinned = -1, step = 1e9, playing = false, dirty = false;
  let shown = null, walk = null, good = null; // good: the settings of the last frame that was drawn as asked

  // ---------------------------------------------------------------- controls
  const labelled = (text, control, extra = {}) => element("label", extra, element("span", {}, text), control);
  const select = (name, choices) => {
    const box = element("select", { name });
    for (const [value, text] of choices) box.append(element("option", { value, textContent: text }));
    box.addEventListener("change", () => change({ [name]: typeof DEFAULTS[name] === "number" ? Number(box.value) : box.value }));
    return box;
  };
  const number = (name, more) => {
    const box = element("input", { type: "number", name, ...more });
    box.addEventListener("change", () => { if (box.value !== "" && box.checkValidity()) change({ [name]: Number(box.value) }); else { box.value = state[name]; } });
    return box;
  };
  const text = (name, more) => {
    const box = element("input", { type: "text", name, spellcheck: false, autocomplete: "off", ...more });
    box.addEventListener("change", () => change({ [name]: box.value }));
    return box;
  };
  const list = element("datalist", { id: `${id}-questions` });
  const controls = {
    question: text("question", { list: list.id, placeholder: "choose from the list, or type" }),
    negative_question: text("negative_question", { list: list.id, placeholder: "none" }),
    method: select("method", [["classifier-free", "classifier-free (HyperLDM)"], ["classifier", "classifier (HyperCLIP)"], ["both", "both, side by side"]]),
    projection: select("projection", [["pca", "principal components"], ["umap", "UMAP"]]),
    num_inference_steps: select("num_inference_steps", [10, 20, 25, 40, 50, 100].map(n => [n, n])),
    sampler: select("sampler", [["ddim", "DDIM"], ["dpmsolver++", "DPM-Solver++"], ["ddpm", "DDPM"]]),
    chains: select("chains", [1, 4, 8, 16, 32, 64].map(n => [n, n])),
    prior_weight: number("prior_weight", { min: 0, max: 10, step: "any" }),
    seed: number("seed", { min: 0, max: 999999, step: 1 }),
  };
  const slider = element("input", { type: "range", id: `${id}-gamma`, min: 0, max: 10, step: 0.25, name: "guidance_scale" });
  slider.setAttribute("aria-label", "Guidance scale");
  const sliderValue = element("output", { htmlFor: `${id}-gamma` });
  slider.addEventListener("input", () => change({ guidance_scale: Number(slider.value) }));
  const play = element("button", { type: "button", textContent: "Play" });
  const scrubber = element("input", { type: "range", min: 0, max: 25, step: 1, id: `${id}-step`, name: "step" });
  scrubber.setAttribute("aria-label", "Step of guidance");
  const stepText = element("output", { htmlFor: `${id}-step` });
  const compare = element("button", { type: "button", textContent: "Compare" });
  compare.setAttribute("aria-pressed", "false");
  compare.title = "Keep the present trajectories as a ghost";
  const stop = element("button", { type: "button", textContent: "Stop", hidden: true });
  const progress = element("progress", { hidden: true, max: 1 }), statusText = element("span");
  progress.setAttribute("aria-label", "Progress");
  const status = element("div", { className: "status" }, statusText, progress, stop);
  statusText.setAttribute("role", "status");
  const error = element("div", { className: "error" });
  error.setAttribute("role", "alert");
  const note = element("div", { className: "note" });
  const tip = element("div", { className: "tip", hidden: true });

  // ---------------------------------------------------------------- views
  const figure = (kind, caption) => {
    const canvas = element("canvas"), title = element("figcaption", { textContent: caption });
    canvas.setAttribute("role", "img");
    return { canvas, title, node: element("figure", { className: kind }, title, canvas) };
  };
  const left = figure("plane", "HyperLDM, classifier-free"), right = figure("plane", "HyperCLIP, classifier guidance");
  const along = figure("chart", "Along the path: accuracy and cosine"), curve = figure("chart", "This question's accuracy over the guidance scale");
  const legend = element("div", { className: "legend" }), strip = element("ul", { className: "strip" });
  const only = (...nodes) => link.still ? "" : nodes[0];
  const top = element("div", { className: "top" }, labelled("Question", controls.question), labelled("Guide away from (negative question)", controls.negative_question), list);
  const more = element("div", { className: "more" }, labelled("Method", controls.method), labelled("Projection", controls.projection), labelled("Steps", controls.num_inference_steps),
    labelled("Sampler", controls.sampler), labelled("Chains", controls.chains), labelled("L2 prior weight", controls.prior_weight), labelled("Seed", controls.seed));
  root.append(...(link.still ? [element("h3", { textContent: state.question })] : [top, more]), note,
    element("div", { className: "gamma" }, element("label", { htmlFor: slider.id, textContent: "Guidance scale γ" }), slider, sliderValue), error,
    element("div", { className: "views" },
      element("div", {}, element("div", { className: "planes" }, left.node, right.node, tip), legend,
        element("div", { className: "play" }, play, scrubber, stepText, compare), only(status)),
      element("div", {}, along.node, curve.node)),
    element("h3", { textContent: "Query pictures: answers of all chains together; the mark is the unguided network's probability" }), strip);

  // ---------------------------------------------------------------- state
  let timer = 0, silence = 0;
  function change(values) {
    const before = keyOf(state);
    Object.assign(state, values);
    // at once, before the kernel has heard of it
    if (!link.still && keyOf(state) !== before) working("question" in values ? "reading the question" : "computing", null);
    if (!("guidance_scale" in values)) { error.textContent = ""; step = 1e9; }
    show();
    if (link.still) return;
    clearTimeout(timer);
    // with this frame already here, the kernel need not hurry; without it, every millisecond counts
    if (sweep().get(state.guidance_scale) && "guidance_scale" in values) timer = setTimeout(tell, 150); else tell();
  }
  function tell() {
    link.set({ ...state });
    clearTimeout(silence);
    silence = setTimeout(() => working("no answer from the kernel so far: if it was restarted, run the cell again", null, false), 5000);
  }
  function working(text, part, busy = true) {
    statusText.textContent = text;
    progress.hidden = stop.hidden = !busy;
    if (part != null) progress.value = part; else progress.removeAttribute("value");
    root.dataset.busy = busy;
  }
  const viewed = () => error.textContent && good ? good : keyOf(state); // what cannot be asked leaves the view as it was
  function sweep(key = viewed()) {
    if (!sweeps.has(key)) {
      sweeps.set(key, new Map());
      while (sweeps.size > 6) sweeps.delete(sweeps.keys().next().value);
    }
    return sweeps.get(key);
  }
  function show() {
    const frames = sweep();
    // show the nearest scale that is there while the exact one is on its way
    let best = null;
    if (state.method !== "classifier") for (const [g, f] of frames) if (g !== "walk" && (!best || Math.abs(g - state.guidance_scale) < Math.abs(best.gamma - state.guidance_scale))) best = f;
    walk = state.method === "classifier-free" ? null : frames.get("walk") || null;
    shown = state.method === "classifier" ? walk : best;
    if (shown) good = viewed();
    for (const [name, control] of Object.entries(controls)) if (document.activeElement !== control || control.tagName === "SELECT") control.value = state[name];
    slider.value = state.guidance_scale;
    sliderValue.textContent = state.guidance_scale.toFixed(2);
    slider.setAttribute("aria-valuetext", state.guidance_scale.toFixed(2));
    slider.disabled = state.method === "classifier";
    controls.prior_weight.disabled = state.method === "classifier-free";
    controls.negative_question.disabled = controls.sampler.disabled = state.method === "classifier";
    right.node.hidden = state.method !== "both";
    left.title.textContent = state.method === "classifier" ? "HyperCLIP, classifier guidance" : `HyperLDM, classifier-free, γ = ${(shown && shown.gamma !== "walk" ? shown.gamma : state.guidance_scale).toFixed(2)}`;
    right.title.textContent = "HyperCLIP, classifier guidance";
    redraw();
  }
  const redraw = () => { if (!dirty) { dirty = true; requestAnimationFrame(draw); } };
  const points = () => Math.max(shown ? shown.points : 1, walk ? walk.points : 1) - 1;
  const now = () => Math.min(step, points());

  play.addEventListener("click", () => {
    playing = !playing;
    if (playing && now() >= points()) step = 0;
    play.textContent = playing ? "Pause" : "Play";
    redraw();
    let last = performance.now();
    const advance = time => {
      if (!playing || !root.isConnected) return;
      const by = Math.floor((time - last) / (2500 / Math.max(1, points())));
      if (by) { last = time; step = now() + by; if (step >= points()) { step = 1e9; playing = false; play.textContent = "Play"; } redraw(); }
      if (playing) requestAnimationFrame(advance);
    };
    requestAnimationFrame(advance);
  });
  scrubber.addEventListener("input", () => { playing = false; play.textContent = "Play"; step = Number(scrubber.value) >= points() ? 1e9 : Number(scrubber.value); redraw(); });
  compare.addEventListener("click", () => {
    ghost = ghost ? null : { left: shown, right: walk, gamma: state.guidance_scale, question: asked && asked.question };
    compare.setAttribute("aria-pressed", String(!!ghost));
    compare.textContent = ghost ? "Drop ghost" : "Compare";
    redraw();
  });
  stop.addEventListener("click", () => link.send({ type: "stop" }));

  // ---------------------------------------------------------------- messages
  function receive(message, buffers) {
    clearTimeout(silence);
    const floats = i => { const b = buffers[i]; return new Float32Array(b.buffer.slice(b.byteOffset, b.byteOffset + b.byteLength)); };
    if (message.type === "scene") {
      scene = { ...message, points: floats(0) };
      const names = [...new Set(scene.kinds)];
      scene.kind = scene.kinds.map(k => names.indexOf(k));
      scene.names = names;
      drawLegend();
      list.replaceChildren(...message.choices.map(q => element("option", { value: q })));
    } else if (message.type === "asked") {
      if (keyOf(message.settings) !== keyOf(state)) return;
      if (asked) asked.urls.forEach(url => URL.revokeObjectURL(url));
      asked = { ...message, before: floats(0) };
      asked.urls = message.pictures ? buffers.slice(1).map(b => URL.createObjectURL(new Blob([b], { type: "image/png" }))) : [];
      strip.replaceChildren();
      drawLegend();
      note.textContent = link.still ? "" : message.note; // there the question is the heading
      controls.question.placeholder = message.question;
      if (land && land.question !== asked.question) land = null;
    } else if (message.type === "landscape") {
      const values = floats(0);
      if (!asked || keyOf(message.settings) !== keyOf(state)) return;
      asked.low = message.low;
      drawLegend();
      land = { ...message, values, image: landscapeImage(values, message.size) };
    } else if (message.type === "frame") {
      const data = floats(0), { points: p, chains: c, key_points: k, shape } = message;
      const f = { ...message, path: data.subarray(0, p * c * 2), accuracy: data.subarray(p * c * 2, p * c * 3), cosine: data.subarray(p * c * 3, p * c * 4), votes: data.subarray(p * c * 4) };
      sweep(keyOf(message.settings)).set(message.gamma, f);
    } else if (message.type === "votes") {
      const frame = sweep(keyOf(message.settings)).get(message.gamma); // as the frame before, but for every step
      if (frame) Object.assign(frame, { votes: floats(0), shape: message.shape, key_points: message.key_points });
    } else if (message.type === "status") {
      working(message.text, message.part, message.busy);
    } else if (message.type === "error") {
      error.textContent = message.text;
    }
    show();
  }
  function adopt(settings) { Object.assign(state, settings); show(); }

  // ---------------------------------------------------------------- drawing
  const theme = () => getComputedStyle(root);
  let css = {};
  function surface(canvas) {
    const ratio = window.devicePixelRatio || 1, w = canvas.clientWidth, h = canvas.clientHeight;
    if (canvas.width !== Math.round(w * ratio) || canvas.height !== Math.round(h * ratio)) { canvas.width = Math.round(w * ratio); canvas.height = Math.round(h * ratio); }
    const g = canvas.getContext("2d");
    g.setTransform(ratio, 0, 0, ratio, 0, 0);
    g.fillStyle = css.bg; g.fillRect(0, 0, w, h);
    g.font = '13px system-ui, -apple-system, "Segoe UI", Roboto, "Liberation Sans", sans-serif';
    return [g, w, h];
  }
  function symbol(g, shape, x, y, r) {
    g.beginPath();
    if (shape === "disc") g.arc(x, y, r, 0, 7);
    else if (shape === "square") g.rect(x - r * 0.9, y - r * 0.9, 1.8 * r, 1.8 * r);
    else if (shape === "triangle") { g.moveTo(x, y - 1.2 * r); g.lineTo(x + 1.1 * r, y + 0.8 * r); g.lineTo(x - 1.1 * r, y + 0.8 * r); g.closePath(); }
    else if (shape === "diamond") { g.moveTo(x, y - 1.3 * r); g.lineTo(x + 1.3 * r, y); g.lineTo(x, y + 1.3 * r); g.lineTo(x - 1.3 * r, y); g.closePath(); }
    else { g.rect(x - r * 1.2, y - r * 0.4, 2.4 * r, 0.8 * r); g.rect(x - r * 0.4, y - r * 1.2, 0.8 * r, 2.4 * r); }
    g.fill();
  }
  const colour = i => (root.dataset.theme === "dark" ? BRIGHT : KINDS)[i % KINDS.length];
  function swatch(i) {
    const svg = element("canvas", { width: 26, height: 26 });
    svg.style.cssText = "display:inline-block;width:13px;height:13px;margin-right:5px;vertical-align:-2px";
    svg.setAttribute("aria-hidden", "true");
    const g = svg.getContext("2d"); g.fillStyle = colour(i); symbol(g, SHAPES[i % SHAPES.length], 13, 13, 9);
    return svg;
  }
  function drawLegend() {
    const low = asked ? asked.low : 0;
    if (scene) legend.replaceChildren(...scene.names.map((n, i) => element("span", {}, swatch(i), n || "zoo")),
      element("span", {}, "accuracy (paths, background): ", element("span", { className: "scale" }, percent(low), bar(), "100 %")),
      element("span", {}, "○ start   ● end   ◆ end beyond the edge"));
  }
  function bar() {
    const node = element("i", { className: "bar" });
    node.style.background = `linear-gradient(90deg, ${[0, .25, .5, .75, .999].map(cividis).join(",")})`;
    return node;
  }
  function landscapeImage(values, size) {
    const image = element("canvas", { width: size, height: size }), g = image.getContext("2d"), data = g.createImageData(size, size);
    const { low } = asked; // as for the paths: up to 100 %
    for (let i = 0; i < values.length; i++) {
      const row = size - 1 - Math.floor(i / size), at = 4 * (row * size + i % size);
      const [r, gr, b] = cividis((values[i] - low) / (1 - low || 1)).match(/\d+/g).map(Number);
      data.data.set([r, gr, b, 255], at);
    }
    g.putImageData(data, 0, 0);
    return image;
  }
  const box = (w, h) => ({ x: 34, y: 8, w: w - 44, h: h - 38 });
  const place = (b, x, y) => [b.x + (x - scene.low[0]) / (scene.high[0] - scene.low[0]) * b.w, b.y + b.h - (y - scene.low[1]) / (scene.high[1] - scene.low[1]) * b.h];

  function drawPlane(view, frame, old) {
    const [g, w, h] = surface(view.canvas);
    if (!scene) return;
    const b = box(w, h);
    g.save(); g.beginPath(); g.rect(b.x, b.y, b.w, b.h); g.clip();
    if (land) { g.globalAlpha = root.dataset.theme === "dark" ? 0.38 : 0.22; g.imageSmoothingEnabled = true; g.drawImage(land.image, b.x, b.y, b.w, b.h); }
    g.globalAlpha = 0.55;
    for (let i = 0; i < scene.kind.length; i++) {
      g.fillStyle = colour(scene.kind[i]);
      symbol(g, SHAPES[scene.kind[i] % SHAPES.length], ...place(b, scene.points[2 * i], scene.points[2 * i + 1]), 2.2);
    }
    g.globalAlpha = 1;
    if (old) drawChains(g, b, old, old.points - 1, true);
    if (frame) drawChains(g, b, frame, Math.min(now(), frame.points - 1), false);
    const named = hover >= 0 ? hover : pinned;
    if (named >= 0) { const [x, y] = place(b, scene.points[2 * named], scene.points[2 * named + 1]); g.strokeStyle = css.fg; g.lineWidth = 2; g.beginPath(); g.arc(x, y, 7, 0, 7); g.stroke(); }
    g.restore();
    g.strokeStyle = css.line; g.lineWidth = 1; g.strokeRect(b.x + .5, b.y + .5, b.w, b.h);
    g.fillStyle = css.soft; g.textAlign = "center"; g.textBaseline = "alphabetic";
    fit(g, scene.labels[0], b.x + b.w / 2, h - 8, b.w);
    g.save(); g.translate(20, b.y + b.h / 2); g.rotate(-Math.PI / 2); fit(g, scene.labels[1], 0, 0, b.h); g.restore();
    const mean = frame ? average(frame.accuracy, Math.min(now(), frame.points - 1), frame.chains) : 0;
    view.canvas.setAttribute("aria-label", frame ? `Latent plane with ${scene.kind.length} zoo points and ${frame.chains} chains; at step ${Math.min(now(), frame.points - 1)} their mean accuracy is ${percent(mean)}` : "Latent plane with the zoo");
  }
  function fit(g, line, x, y, room) { if (g.measureText(line).width > room) line = line.replace(/ principal component/, " PC").replace(/ of the variance/, ""); g.fillText(line, x, y, room); }
  function drawChains(g, b, f, upto, faint) {
    const { path, accuracy, chains: c } = f;
    const at = (p, i) => place(b, path[2 * (p * c + i)], path[2 * (p * c + i) + 1]);
    g.lineCap = g.lineJoin = "round";
    if (faint) { g.globalAlpha = 0.55; g.strokeStyle = g.fillStyle = css.soft; g.lineWidth = 1.2; g.setLineDash([4, 3]); }
    else { g.strokeStyle = css.bg; g.globalAlpha = .7; g.lineWidth = 3.4; }
    for (let i = 0; i < c; i++) { g.beginPath(); g.moveTo(...at(0, i)); for (let p = 1; p <= upto; p++) g.lineTo(...at(p, i)); g.stroke(); }
    g.setLineDash([]);
    if (!faint) {
      g.globalAlpha = 1; g.lineWidth = 1.7;
      // one stroke for all segments of a colour: thousands of strokes would cost the frame
      const batches = new Map(), { low } = asked;
      for (let p = 1; p <= upto; p++) for (let i = 0; i < c; i++) {
        const level = Math.round(15 * Math.min(1, Math.max(0, (accuracy[p * c + i] - low) / (1 - low || 1))));
        if (!batches.has(level)) batches.set(level, new Path2D());
        const line = batches.get(level); line.moveTo(...at(p - 1, i)); line.lineTo(...at(p, i));
      }
      for (const [level, line] of batches) { g.strokeStyle = cividis(level / 15); g.stroke(line); }
    }
    for (let i = 0; i < c; i++) {
      if (!faint) { g.fillStyle = css.bg; g.strokeStyle = css.fg; g.lineWidth = 1; g.beginPath(); g.arc(...at(0, i), 2.6, 0, 7); g.fill(); g.stroke(); }
      const [x, y] = at(upto, i), cx = Math.min(b.x + b.w - 5, Math.max(b.x + 5, x)), cy = Math.min(b.y + b.h - 5, Math.max(b.y + 5, y));
      const outside = x < b.x || x > b.x + b.w || y < b.y || y > b.y + b.h; // its place on the edge, as another shape
      g.fillStyle = faint ? css.soft : css.fg; symbol(g, outside ? "diamond" : "disc", ...(outside ? [cx, cy] : [x, y]), faint ? 3 : 3.4);
      if (!faint) { g.strokeStyle = css.bg; g.lineWidth = .8; g.stroke(); }
    }
    g.globalAlpha = 1;
  }
  const average = (values, p, c) => { let sum = 0; for (let i = 0; i < c; i++) sum += values[p * c + i]; return sum / c; };

  function axes(g, w, h, xs, ys, xlabel, ylabel) {
    const b = { x: 50, y: 26, w: w - 62 - NAMES, h: h - 68 }; // names stand above and to the right, where no curve can cross them
    const X = x => b.x + (x - xs[0]) / (xs[1] - xs[0]) * b.w, Y = y => b.y + b.h - (y - ys[0]) / (ys[1] - ys[0]) * b.h;
    g.strokeStyle = css.line; g.lineWidth = 1; g.beginPath(); g.moveTo(b.x + .5, b.y); g.lineTo(b.x + .5, b.y + b.h + .5); g.lineTo(b.x + b.w, b.y + b.h + .5); g.stroke();
    g.fillStyle = css.soft; g.textBaseline = "middle"; g.textAlign = "right";
    const span = ys[1] - ys[0], every = span > .6 ? .25 : span > .3 ? .1 : .05;
    for (let y = Math.ceil(ys[0] / every) * every; y <= ys[1] + 1e-9; y += every) { g.fillText(`${Math.round(100 * y)}`, b.x - 6, Y(y)); g.globalAlpha = .25; g.beginPath(); g.moveTo(b.x, Y(y)); g.lineTo(b.x + b.w, Y(y)); g.stroke(); g.globalAlpha = 1; }
    g.textAlign = "center"; g.textBaseline = "alphabetic";
    const ticks = 5, round = xs[1] > 20 ? 0 : 1;
    for (let i = 0; i <= ticks; i++) { const x = xs[0] + i / ticks * (xs[1] - xs[0]); g.fillText(String(Number(x.toFixed(round))), X(x), b.y + b.h + 17); }
    g.fillText(xlabel, b.x + b.w / 2, h - 8);
    g.save(); g.translate(14, b.y + b.h / 2); g.rotate(-Math.PI / 2); g.fillText(ylabel, 0, 0); g.restore();
    return { b, X, Y };
  }
  const NAMES = 96; // pixels to the right of a chart
  function levels(g, b, Y) {
    const known = [["few-shot", [7, 3, 2, 3]], ["unguided", [6, 4]], ["chance", [2, 3]]].filter(([name]) => name in asked.levels);
    const rows = known.map(([name, dash]) => ({ name, dash, value: asked.levels[name], at: Y(asked.levels[name]) })).sort((a, b) => a.at - b.at);
    let above = b.y - 12;
    for (const row of rows) above = row.y = Math.max(row.at, above + 15); // below each other, where levels lie close together
    let under = b.y + b.h + 8;
    for (const row of [...rows].reverse()) under = row.y = Math.min(row.y, under - 15);
    for (const { name, dash, value, at, y } of rows) {
      line(g, css.soft, 1.3, dash, [[b.x, at], [b.x + b.w, at]]);
      line(g, css.line, 1, [], [[b.x + b.w, at], [b.x + b.w + 7, y]]);
      g.fillStyle = css.soft; g.textAlign = "left"; g.textBaseline = "middle"; g.fillText(`${name} ${percent(value)}`, b.x + b.w + 10, y, NAMES - 2);
    }
  }
  function names(g, b, parts) {
    let x = b.x;
    g.textAlign = "left"; g.textBaseline = "alphabetic";
    for (const [color, words] of parts) { g.fillStyle = color; g.fillText(words, x, b.y - 10); x += g.measureText(words).width + 14; }
  }
  const line = (g, color, width, dash, points) => { g.strokeStyle = color; g.lineWidth = width; g.setLineDash(dash); g.beginPath(); points.forEach(([x, y], i) => i ? g.lineTo(x, y) : g.moveTo(x, y)); g.stroke(); g.setLineDash([]); };
  const ORANGE = () => root.dataset.theme === "dark" ? "#F0B030" : "#A35F00", BLUE = () => css.accent;

  function drawAlong() {
    const [g, w, h] = surface(along.canvas);
    if (!shown || !asked) return;
    const { X, Y, b } = axes(g, w, h, [0, points()], [-0.1, 1], "step", "%");
    levels(g, b, Y);
    const draw = (f, dash) => {
      const range = [...Array(f.points).keys()];
      line(g, BLUE(), 2.4, dash, range.map(p => [X(p), Y(average(f.accuracy, p, f.chains))]));
      line(g, ORANGE(), 2, dash, range.map(p => [X(p), Y(average(f.cosine, p, f.chains))]));
    };
    draw(shown, []);
    if (walk && walk !== shown) draw(walk, [3, 3]);
    names(g, b, [[BLUE(), "accuracy"], [ORANGE(), "cosine × 100"], ...(walk && walk !== shown ? [[css.soft, "dotted: HyperCLIP"]] : [])]);
    line(g, css.fg, 1.5, [], [[X(now()), b.y], [X(now()), b.y + b.h]]);
    const p = Math.min(now(), shown.points - 1);
    along.canvas.setAttribute("aria-label", `At step ${p} of ${shown.points - 1}: mean accuracy ${percent(average(shown.accuracy, p, shown.chains))}, mean cosine ${average(shown.cosine, p, shown.chains).toFixed(2)}; ` + Object.entries(asked.levels).map(([name, value]) => `${name} ${percent(value)}`).join(", "));
  }
  function drawCurve() {
    const [g, w, h] = surface(curve.canvas);
    if (!asked) return;
    const { X, Y, b } = axes(g, w, h, [0, 10], [0, 1], "guidance scale γ", "accuracy (%)");
    levels(g, b, Y);
    const frames = [...sweep()].filter(([g]) => g !== "walk").map(([, f]) => f).sort((a, b) => a.gamma - b.gamma);
    line(g, BLUE(), 2.4, [], frames.map(f => [X(f.gamma), Y(f.together)]));
    line(g, css.soft, 1.6, [4, 3], frames.map(f => [X(f.gamma), Y(average(f.accuracy, f.points - 1, f.chains))]));
    for (const f of frames) { g.fillStyle = BLUE(); g.beginPath(); g.arc(X(f.gamma), Y(f.together), 2, 0, 7); g.fill(); }
    if (walk) line(g, ORANGE(), 1.6, [3, 3], [[b.x, Y(walk.together)], [b.x + b.w, Y(walk.together)]]);
    names(g, b, [[BLUE(), "all chains together"], [css.soft, "mean chain"], ...(walk ? [[ORANGE(), `HyperCLIP ${percent(walk.together)}`]] : [])]);
    if (state.method !== "classifier") {
      line(g, css.fg, 1.5, [], [[X(state.guidance_scale), b.y], [X(state.guidance_scale), b.y + b.h]]);
      if (shown) { g.fillStyle = css.fg; g.beginPath(); g.arc(X(shown.gamma), Y(shown.together), 5, 0, 7); g.fill(); g.strokeStyle = css.bg; g.lineWidth = 1.5; g.stroke(); }
    }
    curve.canvas.setAttribute("aria-label", `Accuracy over the guidance scale, ${frames.length} scales computed` + (shown && shown.gamma !== "walk" ? `; at ${shown.gamma} it is ${percent(shown.together)}` : ""));
  }
  function drawStrip() {
    if (!asked || !shown) return;
    const answers = asked.answers, at = Math.min(now(), shown.points - 1);
    let k = 0;
    while (k + 1 < shown.key_points.length && shown.key_points[k + 1] <= at) k++;
    const [, pictures, width] = shown.shape;
    if (strip.children.length !== asked.chosen.length) strip.replaceChildren(...asked.chosen.map((_, i) => {
      const bars = element("div", { className: "bars" });
      for (const a of answers) bars.append(element("span", { textContent: a }), element("div", { className: "track" }, element("div", { className: "fill" }), element("div", { className: "was" })), element("span"));
      return element("li", {}, element("img", { src: asked.urls[i] || "data:,", alt: `query picture ${i + 1}; the right answer is ${answers[asked.right[i]]}`, width: 64, height: 64 }), element("div"), bars);
    }));
    asked.chosen.forEach((_, i) => {
      const after = answers.map((_, a) => shown.votes[(k * pictures + i) * width + a]), before = answers.map((_, a) => asked.before[i * width + a]);
      const best = v => v.indexOf(Math.max(...v)), mark = v => best(v) === asked.right[i] ? "✓" : "✗";
      const item = strip.children[i], bars = item.children[2];
      item.children[1].innerHTML = "";
      item.children[1].append("before", element("br"), `${answers[best(before)]} ${mark(before)}`, element("br"), "after", element("br"), element("strong", { textContent: `${answers[best(after)]} ${mark(after)}` }));
      answers.forEach((a, j) => {
        bars.children[3 * j].style.fontWeight = j === asked.right[i] ? 700 : 400;
        bars.children[3 * j + 1].children[0].style.width = `${100 * after[j]}%`;
        bars.children[3 * j + 1].children[1].style.left = `calc(${100 * before[j]}% - 1px)`;
        bars.children[3 * j + 2].textContent = percent(after[j]);
      });
    });
  }
  function draw() {
    dirty = false;
    if (!root.isConnected) return;
    const style = theme();
    css = Object.fromEntries(["bg", "fg", "soft", "line", "accent"].map(n => [n, style.getPropertyValue(`--${n}`).trim()]));
    scrubber.max = points(); scrubber.value = now();
    stepText.textContent = `step ${now()} of ${points()}`;
    drawPlane(left, shown, ghost && ghost.left);
    if (state.method === "both") drawPlane(right, walk, ghost && ghost.right);
    drawAlong(); drawCurve(); drawStrip();
    const exact = shown && (shown.gamma === "walk" || shown.gamma === state.guidance_scale);
    Object.assign(root.dataset, { shown: exact ? shown.gamma : "", step: now(), frames: sweep().size, ghost: !!ghost, drawn: performance.now() });
  }

  // ---------------------------------------------------------------- pointer
  function nearest(view, event) {
    if (!scene) return -1;
    const r = view.canvas.getBoundingClientRect(), b = box(r.width, r.height), x = event.clientX - r.left, y = event.clientY - r.top;
    let best = -1, distance = 100;
    for (let i = 0; i < scene.kind.length; i++) {
      const [px, py] = place(b, scene.points[2 * i], scene.points[2 * i + 1]), d = (px - x) ** 2 + (py - y) ** 2;
      if (d < distance) { distance = d; best = i; }
    }
    return best;
  }
  function name(i, event) {
    tip.hidden = i < 0;
    if (i < 0) return;
    const r = tip.parentElement.getBoundingClientRect();
    tip.textContent = scene.questions[i];
    tip.style.left = `${Math.min(event.clientX - r.left + 12, r.width * .6)}px`;
    tip.style.top = `${event.clientY - r.top + 12}px`;
  }
  for (const view of [left, right]) {
    view.canvas.addEventListener("pointermove", event => { const i = nearest(view, event); if (i !== hover) { hover = i; name(i, event); redraw(); } });
    view.canvas.addEventListener("pointerleave", () => { hover = -1; tip.hidden = true; redraw(); });
    view.canvas.addEventListener("click", event => { pinned = nearest(view, event); note.textContent = pinned < 0 ? (asked && !link.still ? asked.note : "") : `Zoo point of the training question: ${scene.questions[pinned]}`; redraw(); });
  }

  // ---------------------------------------------------------------- theme and size
  function dress() {
    if (!root.isConnected) return; // widgets are made before they are put on the page
    // by the colour that is really behind the page: it works in JupyterLab, Voila and a plain file
    let node = el, colour = null;
    while (node && node instanceof Element) { const c = getComputedStyle(node).backgroundColor.match(/[\d.]+/g)?.map(Number) ?? [0, 0, 0, 0]; if (c.length < 4 || c[3] > 0.5) { colour = c; break; } node = node.parentElement; }
    const flag = document.body.getAttribute("data-jp-theme-light");
    const dark = flag ? flag === "false" : colour ? 0.3 * colour[0] + 0.6 * colour[1] + 0.1 * colour[2] < 110 : matchMedia("(prefers-color-scheme: dark)").matches;
    root.dataset.theme = dark ? "dark" : "light";
    drawLegend();
    redraw();
  }
  const watcher = new MutationObserver(dress);
  watcher.observe(document.body, { attributes: true, attributeFilter: ["data-jp-theme-light", "data-jp-theme-name", "class", "style"] });
  const media = matchMedia("(prefers-color-scheme: dark)");
  media.addEventListener("change", dress);
  const sizes = new ResizeObserver(() => root.dataset.theme ? redraw() : dress());
  for (const view of [left, right, along, curve]) sizes.observe(view.canvas);
  dress();
  show();
  return { receive, adopt, destroy() { watcher.disconnect(); sizes.disconnect(); media.removeEventListener("change", dress); clearTimeout(timer); clearTimeout(silence); playing = false; root.remove(); } };
}

// The widget: settings are a synchronised trait, everything else comes as messages.
function render({ model, el }) {
  const page = mount(el, {
    settings: model.get("settings"),
    set(settings) { model.set("settings", settings); model.save_changes(); },
    send(message) { model.send(message); },
  });
  const onMessage = (message, buffers) => page.receive(message, buffers || []);
  const onChange = () => page.adopt(model.get("settings"));
  model.on("msg:custom", onMessage);
  model.on("change:settings", onChange);
  model.send({ type: "hello" });
  return () => { model.off("msg:custom", onMessage); model.off("change:settings", onChange); page.destroy(); };
}

export default { render };
