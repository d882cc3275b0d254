"use strict";

// ECG paper on a canvas: 25 mm/s, 10 mm/mV, zoom, calipers. All lengths are millimetres of paper;
// the view says how many pixels one has and which point lies in the upper left corner.
const MM_PER_S = 25;
const MARGIN_MM = { left: 13, right: 4, top: 5, bottom: 9 };
const CALIBRATION_MM = [[-9, 0], [-7, 0], [-7, 1], [-2, 1], [-2, 0], [0, 0]];
const SPELLING = { AVR: "aVR", AVL: "aVL", AVF: "aVF" };
const LAYOUTS = {
  "3x4": {
    rows: [["I", "AVR", "V1", "V4"], ["II", "AVL", "V2", "V5"], ["III", "AVF", "V3", "V6"], ["II"]],
    rowMm: 40,
  },
  "12x1": {
    rows: ["I", "II", "III", "AVR", "AVL", "AVF", "V1", "V2", "V3", "V4", "V5", "V6"].map((lead) => [lead]),
    rowMm: 22,
  },
};
const INK = "#101820", FINE_GRID = "#f8dfdc", BOLD_GRID = "#eab0aa", CALIPER = "#0b57a4";
const GRAB_PX = 9;
const LEAST_PX_PER_MM = 2.2, MOST_PX_PER_MM = 40;

class EcgPaper {
  // onMeasure(text) hears what the calipers say, "" without calipers.
  constructor(canvas, rateHz, leads, filter, onMeasure) {
    Object.assign(this, { canvas, rateHz, leads, filter, onMeasure });
    this.context = canvas.getContext("2d");
    this.layout = "3x4";
    this.gain = 10;
    this.tool = "calipers";
    this.marching = false;
    this.calipers = null;
    this.signals = null; // one Float32Array a lead, mV
    this.fitted = true;
    this.view = { scale: 3, x: 0, y: 0 };
    this.pointers = new Map();
    this.action = null;
    new ResizeObserver(() => this.resize()).observe(canvas);
    canvas.addEventListener("pointerdown", (event) => this.press(event));
    canvas.addEventListener("pointermove", (event) => this.move(event));
    for (const name of ["pointerup", "pointercancel"]) {
      canvas.addEventListener(name, (event) => this.release(event));
    }
    canvas.addEventListener("wheel", (event) => this.wheel(event), { passive: false });
    canvas.addEventListener("dblclick", () => this.fit());
    canvas.addEventListener("contextmenu", (event) => event.preventDefault());
  }

  show(signals) {
    this.signals = signals;
    this.measure(null);
    if (this.fitted) this.fit();
    else this.draw();
  }

  setLayout(name) {
    this.layout = name;
    this.measure(null);
    this.fit();
  }

  setGain(gain) {
    this.gain = gain;
    this.measure(null);
    this.draw();
  }

  setMarching(on) {
    this.marching = on;
    this.draw();
  }

  get seconds() {
    return this.signals ? this.signals[0].length / this.rateHz : 10;
  }

  get size() {
    const { rows, rowMm } = LAYOUTS[this.layout];
    return {
      width: MARGIN_MM.left + this.seconds * MM_PER_S + MARGIN_MM.right,
      height: MARGIN_MM.top + rows.length * rowMm + MARGIN_MM.bottom,
    };
  }

  // View: CSS pixels = (mm - corner) * scale.
  resize() {
    const box = this.canvas.getBoundingClientRect();
    if (!box.width || !box.height) return;
    this.ratio = window.devicePixelRatio || 1;
    this.box = box;
    this.canvas.width = Math.round(box.width * this.ratio);
    this.canvas.height = Math.round(box.height * this.ratio);
    if (this.fitted) this.fit();
    else this.place();
  }

  fit() {
    if (!this.box) return;
    const { width, height } = this.size;
    const whole = Math.min(this.box.width / width, this.box.height / height);
    this.view = { scale: Math.max(whole, LEAST_PX_PER_MM), x: 0, y: 0 };
    this.place();
    this.fitted = true;
  }

  zoom(factor, atX, atY) {
    if (!this.box) return;
    const x = atX ?? this.box.width / 2, y = atY ?? this.box.height / 2;
    const [mmX, mmY] = this.toMm(x, y);
    const scale = Math.min(Math.max(this.view.scale * factor, 1), MOST_PX_PER_MM);
    this.view = { scale, x: mmX - x / scale, y: mmY - y / scale };
    this.fitted = false;
    this.place();
  }

  pan(byX, byY) {
    this.view.x -= byX / this.view.scale;
    this.view.y -= byY / this.view.scale;
    this.fitted = false;
    this.place();
  }

  // Keep the paper in sight: centred where it is smaller than the canvas.
  place() {
    const { width, height } = this.size;
    const held = (corner, shown, all) =>
      shown >= all ? (all - shown) / 2 : Math.min(Math.max(corner, 0), all - shown);
    this.view.x = held(this.view.x, this.box.width / this.view.scale, width);
    this.view.y = held(this.view.y, this.box.height / this.view.scale, height);
    this.draw();
  }

  toMm(x, y) {
    return [this.view.x + x / this.view.scale, this.view.y + y / this.view.scale];
  }

  // Pointer: one finger or the left button uses the tool, two fingers zoom, other buttons move.
  at(event) {
    const box = this.canvas.getBoundingClientRect();
    return [event.clientX - box.left, event.clientY - box.top];
  }

  press(event) {
    this.canvas.setPointerCapture(event.pointerId);
    const [x, y] = this.at(event);
    this.pointers.set(event.pointerId, [x, y]);
    if (this.pointers.size === 2) this.action = "pinch";
    else if (event.button !== 0 || this.tool === "pan") this.action = "pan";
    else this.action = this.grab(x, y);
    this.canvas.focus({ preventScroll: true });
    event.preventDefault();
  }

  // Return which end of the calipers moves: an end under the pointer, or that of new calipers.
  grab(x, y) {
    const [mmX, mmY] = this.toMm(x, y);
    const near = (mm) => Math.abs(mm - mmX) * this.view.scale < GRAB_PX;
    if (this.calipers && near(this.calipers.x1)) return 1;
    if (this.calipers && near(this.calipers.x2)) return 2;
    this.measure({ x1: mmX, y1: mmY, x2: mmX, y2: mmY });
    return 2;
  }

  move(event) {
    if (!this.pointers.has(event.pointerId)) return;
    const [x, y] = this.at(event), [oldX, oldY] = this.pointers.get(event.pointerId);
    const before = this.spread();
    this.pointers.set(event.pointerId, [x, y]);
    if (this.action === "pinch" && this.pointers.size === 2) {
      const after = this.spread();
      this.pan((x - oldX) / 2, (y - oldY) / 2);
      this.zoom(after.distance / Math.max(before.distance, 1), after.x, after.y);
    } else if (this.action === "pan") {
      this.pan(x - oldX, y - oldY);
    } else if (this.calipers && (this.action === 1 || this.action === 2)) {
      const [mmX, mmY] = this.toMm(x, y);
      this.measure({ ...this.calipers, [`x${this.action}`]: mmX, [`y${this.action}`]: mmY });
    }
  }

  spread() {
    const [[x1, y1], [x2, y2]] = [...this.pointers.values(), [0, 0], [0, 0]];
    return { distance: Math.hypot(x2 - x1, y2 - y1), x: (x1 + x2) / 2, y: (y1 + y2) / 2 };
  }

  release(event) {
    this.pointers.delete(event.pointerId);
    const c = this.calipers;
    const tiny = c && Math.hypot(c.x2 - c.x1, c.y2 - c.y1) * this.view.scale < 4;
    if (tiny && this.action !== "pan") this.measure(null);
    this.action = null;
  }

  wheel(event) {
    event.preventDefault();
    const [x, y] = this.at(event);
    const lines = event.deltaMode === 1 ? 30 : 1;
    this.zoom(Math.exp(-event.deltaY * lines * 0.0015), x, y);
  }

  // Move the second edge of the calipers by samples and twentieths of a millivolt.
  nudge(samples, twentieths) {
    if (!this.calipers) return false;
    const { x2, y2 } = this.calipers;
    const x = x2 + (samples / this.rateHz) * MM_PER_S, y = y2 - (twentieths / 20) * this.gain;
    this.measure({ ...this.calipers, x2: x, y2: y });
    return true;
  }

  measure(calipers) {
    this.calipers = calipers;
    this.onMeasure(this.reading());
    this.draw();
  }

  reading() {
    if (!this.calipers) return "";
    const { x1, y1, x2, y2 } = this.calipers;
    const ms = (Math.abs(x2 - x1) / MM_PER_S) * 1000, mv = Math.abs(y2 - y1) / this.gain;
    const bpm = ms >= 100 ? `${Math.round(60000 / ms)} bpm` : "- bpm";
    return `${Math.round(ms)} ms   ${bpm}   ${mv.toFixed(2)} mV`;
  }

  draw() {
    if (!this.signals || !this.box) return;
    const { context: c, view, ratio } = this;
    const scale = view.scale * ratio;
    const x = (mm) => (mm - view.x) * scale, y = (mm) => (mm - view.y) * scale;
    const pen = { c, x, y, scale };
    c.setTransform(1, 0, 0, 1, 0, 0);
    c.fillStyle = "#dde1e8";
    c.fillRect(0, 0, this.canvas.width, this.canvas.height);
    c.fillStyle = "#fffdfc";
    c.fillRect(x(0), y(0), this.size.width * scale, this.size.height * scale);
    this.drawGrid(pen);
    this.drawTraces(pen);
    if (this.calipers) this.drawCalipers(pen);
  }

  drawGrid({ c, x, y, scale }) {
    const { width, height } = this.size;
    for (const [step, colour] of [[1, FINE_GRID], [5, BOLD_GRID]]) {
      if (step * scale < 2.5) continue;
      c.fillStyle = colour;
      const thick = Math.max(1, Math.round((step === 5 ? 0.16 : 0.1) * scale));
      for (let mm = 0; mm <= width; mm += step) {
        c.fillRect(Math.round(x(mm)), y(0), thick, height * scale);
      }
      for (let mm = 0; mm <= height; mm += step) {
        c.fillRect(x(0), Math.round(y(mm)), width * scale, thick);
      }
    }
  }

  drawTraces(pen) {
    const { c, x, y, scale } = pen;
    const { rows, rowMm } = LAYOUTS[this.layout];
    c.lineJoin = "round";
    c.lineCap = "butt";
    const font = Math.min(Math.max(3.4 * scale, 11 * this.ratio), 22 * this.ratio);
    rows.forEach((row, number) => {
      const base = MARGIN_MM.top + (number + 0.5) * rowMm;
      const line = (points, smooth = false) => this.line(pen, points, MARGIN_MM.left, base, smooth);
      const samples = Math.floor(this.signals[0].length / row.length);
      row.forEach((lead, column) => {
        const left = MARGIN_MM.left + (column * samples * MM_PER_S) / this.rateHz;
        // Beyond the left edge a name waits there, for as long as its trace is in sight.
        const end = x(left + (samples * MM_PER_S) / this.rateHz) - 3 * font;
        const at = Math.min(Math.max(x(left + 1.2), 8 * this.ratio), Math.max(end, x(left + 1.2)));
        this.text(pen, SPELLING[lead] ?? lead, at, y(base - rowMm * 0.32), font);
      });
      line(CALIBRATION_MM);
      row.forEach((lead, column) => {
        const left = (column * samples * MM_PER_S) / this.rateHz;
        const trace = this.signals[this.leads.indexOf(lead)];
        // One sample more than the column holds joins it to the next without a gap.
        const part = trace.subarray(column * samples, (column + 1) * samples + 1);
        line(Array.from(part, (mv, k) => [left + (k * MM_PER_S) / this.rateHz, mv]), true);
        if (column) {
          const tick = 3 / this.gain;
          line([[left, 0.5 + tick], [left, 0.5 + 2 * tick]]);
          line([[left, -0.5 - tick], [left, -0.5 - 2 * tick]]);
        }
      });
    });
    const note = `25 mm/s   ${this.gain} mm/mV   ${this.filter}`;
    this.text(pen, note, x(MARGIN_MM.left), y(this.size.height - 3), font * 0.85, "normal");
  }

  // Draw points [mm, mV] relative to the left edge and a row's zero line, large ones smoothly.
  line({ c, x, y, scale }, points, left, base, smooth) {
    c.beginPath();
    const at = points.map(([mm, mv]) => [x(left + mm), y(base - mv * this.gain)]);
    c.moveTo(...at[0]);
    for (let k = 1; k < at.length; k++) {
      const [x0, y0] = at[k - 1], [x1, y1] = at[k];
      if (!smooth || x1 - x0 < 1.5) {
        c.lineTo(x1, y1);
        continue;
      }
      // Catmull-Rom: through every sample, along its neighbours.
      const [xa, ya] = at[k - 2] ?? at[k - 1], [xb, yb] = at[k + 1] ?? at[k];
      c.bezierCurveTo(x0 + (x1 - xa) / 6, y0 + (y1 - ya) / 6, x1 - (xb - x0) / 6, y1 - (yb - y0) / 6, x1, y1);
    }
    c.strokeStyle = INK;
    c.lineWidth = Math.min(Math.max(0.3 * scale, 1.1 * this.ratio), 2.6 * this.ratio);
    c.stroke();
  }

  text({ c }, words, left, bottom, font, weight = "600") {
    c.font = `${weight} ${font}px system-ui, sans-serif`;
    c.textBaseline = "alphabetic";
    c.fillStyle = "#fffdfcc0";
    c.fillRect(left - 2, bottom - font, c.measureText(words).width + 4, font * 1.25);
    c.fillStyle = INK;
    c.fillText(words, left, bottom);
  }

  drawCalipers(pen) {
    const { c, x, y } = pen;
    const { x1, y1, x2, y2 } = this.calipers;
    const { width, height } = this.size;
    c.fillStyle = "#0b57a41f";
    c.fillRect(x(x1), y(y1), x(x2) - x(x1), y(y2) - y(y1));
    c.strokeStyle = CALIPER;
    c.lineWidth = 1.2 * this.ratio;
    const stroke = (...ends) => {
      c.beginPath();
      for (const [mmX, mmY] of ends) c.lineTo(x(mmX), y(mmY));
      c.stroke();
    };
    for (const mm of [x1, x2]) stroke([mm, 0], [mm, height]);
    for (const mm of [y1, y2]) stroke([Math.min(x1, x2) - 3, mm], [Math.max(x1, x2) + 3, mm]);
    const step = Math.abs(x2 - x1);
    if (this.marching && step * this.view.scale > 4) {
      c.setLineDash([4 * this.ratio, 4 * this.ratio]);
      for (let mm = Math.max(x1, x2) + step; mm < width; mm += step) stroke([mm, 0], [mm, height]);
      for (let mm = Math.min(x1, x2) - step; mm > 0; mm -= step) stroke([mm, 0], [mm, height]);
      c.setLineDash([]);
    }
    const font = 13 * this.ratio, words = this.reading();
    c.font = `600 ${font}px system-ui, sans-serif`;
    const wide = c.measureText(words).width + 12 * this.ratio;
    const left = Math.min(Math.max(x(Math.min(x1, x2)), 2), this.canvas.width - wide - 2);
    const top = Math.min(y(Math.max(y1, y2)) + 6 * this.ratio, this.canvas.height - font * 1.8);
    c.fillStyle = CALIPER;
    c.fillRect(left, top, wide, font * 1.6);
    c.fillStyle = "#fff";
    c.textBaseline = "middle";
    c.fillText(words, left + 6 * this.ratio, top + font * 0.85);
  }
}
