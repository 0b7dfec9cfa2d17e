// What is drawn on the canvases: pictures, drawings of known environments, or plots of numbers.

const MOST_ROWS = 12;

// One entry for each environment that `about` of a file may name: how many entries its observations have, what its
// discrete actions are called, and a drawing of one observation and action (none after the last step) in a field of
// 4 x 3, x from -2 to 2 and y from 0 (below) to 3.
const DRAWINGS = {
  cart_pole: {
    size: 4,
    actions: ["push left", "push right"],
    draw(pen, [x, , angle], action) {
      const cart = Math.max(-1.9, Math.min(1.9, x / 2.4 * 1.8));
      pen.line([[-1.8, 0.7], [1.8, 0.7]], pen.quiet, 1);
      for (const end of [-1.8, 1.8]) pen.line([[end, 0.55], [end, 0.85]], pen.quiet, 2);
      pen.box(cart - 0.3, 0.7, 0.6, 0.3, pen.fore);
      pen.line([[cart, 1], [cart + 1.6 * Math.sin(angle), 1 + 1.6 * Math.cos(angle)]], pen.accent, 7);
      pen.disc(cart, 1, 0.06, pen.quiet);
      if (action) pen.arrow([[cart, 0.3], [cart + (action[0] ? 0.5 : -0.5), 0.3]]);
    },
  },
  mountain_car: {
    size: 2,
    actions: ["push left", "no push", "push right"],
    draw(pen, [position], action) {
      const across = (x) => (x + 0.3) / 0.9 * 1.9;
      const height = (x) => 0.9 + 0.75 * (Math.sin(3 * x) + 1);
      const xs = Array.from({length: 61}, (_, i) => -1.2 + 1.8 * i / 60);
      pen.line(xs.map((x) => [across(x), height(x)]), pen.quiet, 2);
      pen.line([[across(0.5), height(0.5)], [across(0.5), height(0.5) + 0.45]], pen.fore, 2);
      pen.box(across(0.5), height(0.5) + 0.28, 0.25, 0.17, pen.fore);
      pen.disc(across(position), height(position) + 0.12, 0.12, pen.accent);
      if (action && action[0] !== 1) pen.arrow([[across(position), 0.4], [across(position) + (action[0] ? 0.5 : -0.5), 0.4]]);
    },
  },
  pendulum: {
    size: 3,
    draw(pen, [cosine, sine], action) {
      pen.line([[0, 1.5], [-1.2 * sine, 1.5 + 1.2 * cosine]], pen.accent, 9);
      pen.disc(0, 1.5, 0.07, pen.fore);
      if (!action) return;
      // The torque, counterclockwise where it is above 0: at most a quarter of a turn.
      const turned = (part) => Math.PI / 2 + action[0] / 2 * Math.PI / 2 * part / 12;
      pen.arrow(Array.from({length: 13}, (_, i) => [0.4 * Math.cos(turned(i)), 1.5 + 0.4 * Math.sin(turned(i))]));
    },
  },
};

// For both clips, a function (canvas, tick) that draws and returns what to write above. Scales are of both.
export function prepare(clips, environment, actions) {
  const known = environment !== null && Object.hasOwn(DRAWINGS, environment) ? DRAWINGS[environment] : null;
  const unnamed = (clip) => clip.discrete ? actions : null;
  if (clips.every((clip) => "pixels" in clip)) return clips.map((clip) => drawer(clip, unnamed(clip), pictures(clip)));
  if (known && clips.every((clip) => clip.size === known.size)) {
    return clips.map((clip) => drawer(clip, known.actions ?? null, (pen, frame) => {
      pen.field(4, 3);
      known.draw(pen, clip.entries[frame], clip.actions[frame] ?? null);
    }));
  }
  const all = clips.map(rows);
  const ranges = Array.from({length: Math.max(...all.map((some) => some.length))}, (_, i) => {
    const values = all.flatMap((some) => some[i]?.values ?? []);
    return [Math.min(...values), Math.max(...values)];
  });
  return clips.map((clip, side) => drawer(clip, unnamed(clip), (pen, frame) => plots(pen, all[side], ranges, frame, clip)));
}

export function frames(clip) {
  return "pixels" in clip ? bytes(clip).length / (3 * clip.width * clip.height) : clip.entries.length;
}

function drawer(clip, names, draw) {
  return (canvas, tick) => {
    const pen = new Pen(canvas);
    const count = frames(clip);
    if (!count) {
      pen.text("no steps", 0.5, 0.5);
      return "no steps";
    }
    const frame = Math.min(tick, count - 1);
    draw(pen, frame);
    const ended = clip.steps < clip.length && tick >= clip.steps;
    if (ended) pen.veil();
    if (tick >= clip.steps) return `${ended ? "ended " : ""}after ${clip.steps} ${clip.steps === 1 ? "step" : "steps"}`;
    return `step ${frame + 1} of ${clip.length} · ${called(clip.actions[frame], names)}`;
  };
}

function called(action, names) {
  if (names === null) return `action ${action.map((entry) => Number(entry).toFixed(2)).join(", ")}`;
  return names[action[0]] ?? `action ${action[0]}`;
}

function bytes(clip) {
  return clip.bytes ??= Uint8Array.from(atob(clip.pixels), (letter) => letter.charCodeAt(0));
}

function pictures(clip) {
  const sheet = document.createElement("canvas");
  [sheet.width, sheet.height] = [clip.width, clip.height];
  return (pen, frame) => {
    const image = new ImageData(clip.width, clip.height);
    const all = bytes(clip);
    let place = 3 * clip.width * clip.height * frame;
    for (let i = 0; i < image.data.length; i++) image.data[i] = i % 4 === 3 ? 255 : all[place++];
    sheet.getContext("2d").putImageData(image, 0, 0);
    pen.picture(sheet);
  };
}

// The rows of a plot: entries of observations, then of actions.
function rows(clip) {
  const entries = clip.names.slice(0, MOST_ROWS).map((name, i) => ({name, values: clip.entries.map((step) => step[i])}));
  const places = (clip.actions[0] ?? []).slice(0, 4);
  const actions = places.map((_, i) => ({name: places.length > 1 ? `action ${i}` : "action", values: clip.actions.map((step) => step[i])}));
  return [...entries, ...actions];
}

function plots(pen, all, ranges, frame, clip) {
  const more = clip.size > MOST_ROWS ? 1 : 0;
  const step = 1 / (all.length + more);
  const label = 0.38;
  const last = Math.max(1, clip.length - 1, clip.entries.length - 1);
  const across = (t) => label + (0.98 - label) * t / last;
  all.forEach((row, i) => {
    const [least, most] = ranges[i];
    const up = (value) => (i + 0.5 + 0.36 * (most > least ? 1 - 2 * (value - least) / (most - least) : 0)) * step;
    const value = row.values[frame];
    pen.text(row.name, 0.01, (i + 0.5) * step, "left", pen.quiet, label - 0.17);
    if (value !== undefined) pen.text(short(value), label - 0.02, (i + 0.5) * step, "right");
    const points = row.values.map((value, t) => [across(t), up(value)]);
    pen.line(points, pen.quiet, 1);
    pen.line(points.slice(0, frame + 1), pen.accent, 2.5);
    if (value !== undefined) pen.disc(...points[frame], 0.009, pen.accent);
  });
  if (more) pen.text(`${MOST_ROWS} of ${clip.size} entries`, 0.01, 1 - step / 2, "left", pen.quiet);
  pen.line([[across(frame), 0.01], [across(frame), 0.99]], pen.quiet, 1);
}

const short = (value) => Number.isInteger(value) ? String(value) : value.toPrecision(3);

// A canvas whose unit is its width and height, or those of a field that is as large as fits.
class Pen {
  constructor(canvas) {
    const ratio = window.devicePixelRatio || 1;
    const size = [canvas.clientWidth, canvas.clientHeight].map((length) => Math.max(1, Math.round(length * ratio)));
    if (canvas.width !== size[0] || canvas.height !== size[1]) [canvas.width, canvas.height] = size;
    this.g = canvas.getContext("2d");
    this.size = size;
    this.ratio = ratio;
    this.at = (x, y) => [x * size[0], y * size[1]];
    this.unit = size[0];
    const style = getComputedStyle(canvas);
    for (const name of ["back", "fore", "quiet", "accent", "panel"]) this[name] = style.getPropertyValue(`--${name}`);
    this.g.clearRect(0, 0, ...size);
  }

  field(width, height) {
    this.unit = Math.min(this.size[0] / width, this.size[1] / height);
    this.at = (x, y) => [this.size[0] / 2 + this.unit * x, this.size[1] / 2 + this.unit * (height / 2 - y)];
  }

  line(points, colour, width) {
    Object.assign(this.g, {strokeStyle: colour, lineWidth: width * this.ratio, lineCap: "round", lineJoin: "round"});
    this.g.beginPath();
    for (const point of points) this.g.lineTo(...this.at(...point));
    this.g.stroke();
  }

  box(x, y, width, height, colour) {
    this.g.fillStyle = colour;
    const [left, bottom] = this.at(x, y);
    this.g.fillRect(left, bottom - this.unit * height, this.unit * width, this.unit * height);
  }

  disc(x, y, radius, colour) {
    this.g.fillStyle = colour;
    this.g.beginPath();
    this.g.arc(...this.at(x, y), radius * this.unit, 0, 2 * Math.PI);
    this.g.fill();
  }

  arrow(points) {
    const [[x0, y0], [x1, y1]] = points.slice(-2);
    const way = Math.atan2(y1 - y0, x1 - x0);
    const barb = (turn) => [x1 - 0.16 * Math.cos(way + turn), y1 - 0.16 * Math.sin(way + turn)];
    this.line(points, this.fore, 3);
    this.line([barb(0.6), [x1, y1], barb(-0.6)], this.fore, 3);
  }

  picture(sheet) {
    const fit = Math.min(this.size[0] / sheet.width, this.size[1] / sheet.height);
    const factor = fit > 1 ? Math.floor(fit) : fit;
    const [width, height] = [sheet.width * factor, sheet.height * factor];
    this.g.imageSmoothingEnabled = false;
    this.g.drawImage(sheet, Math.round((this.size[0] - width) / 2), Math.round((this.size[1] - height) / 2), width, height);
  }

  text(words, x, y, align = "center", colour = this.fore, widest = 1) {
    Object.assign(this.g, {fillStyle: colour, textAlign: align, textBaseline: "middle", font: `${13 * this.ratio}px system-ui, sans-serif`});
    this.g.fillText(words, x * this.size[0], y * this.size[1], widest * this.size[0]);
  }

  veil() {
    Object.assign(this.g, {fillStyle: this.panel, globalAlpha: 0.6});
    this.g.fillRect(0, 0, ...this.size);
    this.g.globalAlpha = 1;
  }
}
