// The experts that made the tokens of a reply: how often each was chosen so far, and those of the token looked at.

const TALLEST_ROW = 18, SMALLEST_GAPPED = 5;  // CSS pixels

export class RoutedReply {
  // `routing` is what /v1/models tells of the MoE layers.
  constructor(routing) {
    this.routing = routing;
    this.tokens = [];  // [layers][experts a token] each
    this.counts = new Uint32Array(routing.layers * routing.experts);
  }

  // Returns the new token's place.
  add(experts) {
    const row = layer => layer * this.routing.experts;
    experts.forEach((ofLayer, layer) => ofLayer.forEach(expert => this.counts[row(layer) + expert]++));
    return this.tokens.push(experts) - 1;
  }
}

export class ExpertPanel {
  // `find(id)` gives the page's elements; they are filled here and nowhere else.
  constructor(find) {
    this.find = find;
    this.canvas = find("heat");
    this.reply = null;
    new ResizeObserver(() => this.paintSoon()).observe(this.canvas);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.paintSoon());
    this.canvas.addEventListener("pointermove", event => this.point(event.offsetX, event.offsetY));
    this.canvas.addEventListener("pointerleave", () => this.describe());
  }

  // Some tokens of a reply, by their places, which have made `text` together.
  show(reply, places, text) {
    [this.reply, this.places, this.text] = [reply, places, text];
    this.find("experts").hidden = false;
    this.paintSoon();
  }

  clear() {
    this.reply = null;
    this.find("experts").hidden = true;
  }

  // Tokens may come faster than the screen shows them.
  paintSoon() {
    this.frame ??= requestAnimationFrame(() => {
      this.frame = null;
      if (this.reply) { this.paint(); this.describe(); }
    });
  }

  paint() {
    const {canvas, reply: {counts, routing: {layers, experts, groups}}} = this;
    canvas.style.height = Math.min(TALLEST_ROW, innerHeight / 4 / layers) * layers + "px";
    const width = canvas.width = Math.round(canvas.clientWidth * devicePixelRatio);
    const height = canvas.height = Math.round(canvas.clientHeight * devicePixelRatio);
    const context = canvas.getContext("2d"), color = name => getComputedStyle(canvas).getPropertyValue(name);
    const gapped = Math.min(width / experts, height / layers) >= SMALLEST_GAPPED * devicePixelRatio;
    // Whole device pixels: cells of equal numbers look equal.
    const left = expert => Math.round(expert * width / experts), top = layer => Math.round(layer * height / layers);
    const fill = (layer, expert) => context.fillRect(
      left(expert), top(layer), left(expert + 1) - left(expert) - gapped, top(layer + 1) - top(layer) - gapped);
    const most = counts.reduce((a, b) => Math.max(a, b), 1);
    context.fillStyle = color("--heat");
    counts.forEach((count, cell) => {
      if (!count) return;
      context.globalAlpha = 0.1 + 0.9 * count / most;
      fill(Math.floor(cell / experts), cell % experts);
    });
    context.globalAlpha = 1;
    context.fillStyle = color("--lit");
    for (const place of this.places) {
      this.reply.tokens[place].forEach((ofLayer, layer) => ofLayer.forEach(expert => fill(layer, expert)));
    }
    const line = Math.round(devicePixelRatio) * (gapped ? 3 : 1);
    context.fillStyle = color("--group");
    for (let group = 1; group < groups; group++) {
      context.fillRect(left(group * experts / groups) - Math.ceil(line / 2), 0, line, height);
    }
  }

  describe() {
    const {reply: {tokens, counts, routing}, places, find} = this;
    const {first_layer: first, layers, experts, experts_per_token: chosen} = routing, of = tokens.length;
    find("layers").replaceChildren(...ends(first, first + layers - 1, "layer"));
    find("columns").replaceChildren(...ends(0, experts - 1, "expert"));
    const numbers = places.map(place => place + 1).join(", ");
    find("chosen").textContent = `of token ${numbers} of ${of} ${JSON.stringify(this.text)}`;
    const busiest = counts.reduce((best, count, cell) => count > counts[best] ? cell : best, 0);
    find("spread").textContent = [
      `${percent(counts.filter(Boolean).length / counts.length)} of the experts used`,
      `the busiest, ${name(routing, busiest)}, by ${percent(counts[busiest] / of)} of the tokens`,
      `even load would be ${percent(chosen / experts)}`,
    ].join(" · ");
    find("listing").textContent = Array.from({length: layers}, (_, layer) =>
      `layer ${first + layer}: ${places.map(place => tokens[place][layer].join(" ")).join(" | ")}`).join("\n");
  }

  point(x, y) {
    const {reply: {tokens, counts, routing}, canvas} = this;
    const within = (at, size, count) => Math.min(Math.max(Math.floor(at / size * count), 0), count - 1);
    const layer = within(y, canvas.clientHeight, routing.layers), expert = within(x, canvas.clientWidth, routing.experts);
    const cell = layer * routing.experts + expert;
    this.find("spread").textContent =
      `${name(routing, cell)}: ${counts[cell]} of ${tokens.length} tokens, ${percent(counts[cell] / tokens.length)}`;
  }
}

function name({first_layer: first, experts}, cell) {
  return `layer ${first + Math.floor(cell / experts)} expert ${cell % experts}`;
}

function percent(share) {
  return (100 * share).toFixed(share < 0.1 ? 1 : 0) + "%";
}

function ends(first, last, what) {
  const texts = [`${what} ${first}`, ...(last > first ? [String(last)] : [])];
  return texts.map(textContent => Object.assign(document.createElement("span"), {textContent}));
}
