// Runs an entry in the reader's browser: draw a digit, see the class, every layer's spikes, and what they cost.
// model.onnx, model.json and the runtime lie beside this file; examples/browser.py writes them.

const SIDE = 16;
const page = document.getElementById("try");
const part = (name) => page.querySelector(`[data-part="${name}"]`);

function say(text) {
  part("status").textContent = text;
}

class Network {
  static async load() {
    const here = new URL(".", import.meta.url);
    const about = await (await fetch(new URL("model.json", here))).json();
    const ort = await import(new URL("ort.wasm.min.mjs", here));
    ort.env.wasm.wasmPaths = here.href;
    ort.env.wasm.numThreads = 1;
    const session = await ort.InferenceSession.create(new URL("model.onnx", here).href);
    return new Network(ort, session, about);
  }

  constructor(ort, session, about) {
    Object.assign(this, { ort, session, about });
  }

  // pixels: 256 numbers from 0 (black) to 1 (white)
  async run(pixels) {
    const { mean, std, layers } = this.about;
    const values = Float32Array.from(pixels, (value) => (value - mean) / std);
    const image = new this.ort.Tensor("float32", values, [1, 1, SIDE, SIDE]);
    const outputs = await this.session.run({ image });
    const logits = Array.from(outputs.logits.data);
    const largest = Math.max(...logits);
    const weights = logits.map((value) => Math.exp(value - largest));
    const sum = weights.reduce((a, b) => a + b);
    return {
      best: logits.indexOf(largest),
      probabilities: weights.map((value) => value / sum),
      energy: outputs.energy.data[0],
      spikes: layers.map((name) => outputs[name].data),
    };
  }
}

class Pad {
  constructor(canvas, changed) {
    this.canvas = canvas;
    this.context = canvas.getContext("2d", { willReadFrequently: true });
    this.changed = changed;
    this.clear();
    canvas.addEventListener("pointerdown", (event) => {
      canvas.setPointerCapture(event.pointerId);
      this.last = this.place(event);
      this.stroke(event);
    });
    canvas.addEventListener("pointermove", (event) => event.buttons && this.last && this.stroke(event));
    canvas.addEventListener("pointerup", () => (this.last = null));
  }

  place(event) {
    const box = this.canvas.getBoundingClientRect();
    const scale = this.canvas.width / box.width;
    return [(event.clientX - box.left) * scale, (event.clientY - box.top) * scale];
  }

  stroke(event) {
    const next = this.place(event);
    const { context } = this;
    Object.assign(context, { strokeStyle: "#fff", lineWidth: this.canvas.width / 8, lineCap: "round" });
    context.beginPath();
    context.moveTo(...this.last);
    context.lineTo(...next);
    context.stroke();
    this.last = next;
    this.changed();
  }

  clear() {
    this.context.fillStyle = "#000";
    this.context.fillRect(0, 0, this.canvas.width, this.canvas.height);
  }

  show(source) {
    this.clear();
    this.context.drawImage(source, 0, 0, this.canvas.width, this.canvas.height);
    this.changed();
  }

  showPixels(pixels) {
    const small = new OffscreenCanvas(SIDE, SIDE);
    const data = new ImageData(SIDE, SIDE);
    pixels.forEach((value, i) => data.data.set([255 * value, 255 * value, 255 * value, 255], 4 * i));
    small.getContext("2d").putImageData(data, 0, 0);
    this.clear();
    this.context.imageSmoothingEnabled = false;
    this.show(small);
  }

  // The mean grey of each of 16 x 16 squares; a drawing that is mostly bright is dark on paper, and is inverted.
  pixels() {
    const { width } = this.canvas;
    const { data } = this.context.getImageData(0, 0, width, width);
    const square = width / SIDE;
    const sums = new Float64Array(SIDE * SIDE);
    for (let y = 0; y < width; y++) {
      for (let x = 0; x < width; x++) {
        const i = 4 * (y * width + x);
        const grey = (0.299 * data[i] + 0.587 * data[i + 1] + 0.114 * data[i + 2]) / 255;
        sums[Math.floor(y / square) * SIDE + Math.floor(x / square)] += grey / square ** 2;
      }
    }
    const mean = sums.reduce((a, b) => a + b) / sums.length;
    return Array.from(sums, (value) => (mean > 0.5 ? 1 - value : value));
  }
}

function drawBars(probabilities, classes, best) {
  const bars = probabilities.map((p, i) => {
    const row = document.createElement("div");
    row.className = i === best ? "bar best" : "bar";
    row.innerHTML = `<span></span><i style="width: ${(70 * p).toFixed(1)}%"></i><small>${(100 * p).toFixed(0)} %</small>`;
    row.firstChild.textContent = classes[i];
    return row;
  });
  part("bars").replaceChildren(...bars);
}

// A strip of four rows for each layer, from the image (top) to the answer (bottom); a dot is a neuron that fired.
function drawRaster(spikes) {
  const canvas = part("raster");
  const [rows, gap] = [4, 2];
  canvas.height = spikes.length * (rows + gap);
  const context = canvas.getContext("2d");
  context.imageSmoothingEnabled = false;
  spikes.forEach((layer, i) => {
    const columns = Math.ceil(layer.length / rows);
    const picture = new ImageData(columns, rows);
    layer.forEach((fired, k) => picture.data.set(fired ? [255, 167, 38, 255] : [40, 44, 62, 255], 4 * k));
    const strip = new OffscreenCanvas(columns, rows);
    strip.getContext("2d").putImageData(picture, 0, 0);
    context.drawImage(strip, 0, i * (rows + gap), canvas.width, rows);
  });
}

function report(result, about) {
  const neurons = result.spikes.reduce((sum, layer) => sum + layer.length, 0);
  const fired = result.spikes.reduce((sum, layer) => sum + layer.reduce((a, b) => a + b, 0), 0);
  const [dense, skipped] = about.baseline;
  part("class").textContent = about.classes[result.best];
  part("spikes").textContent = `${fired.toLocaleString("en")} of ${neurons.toLocaleString("en")} neurons fired`;
  part("energy").textContent =
    `${result.energy.toFixed(2)} µJ for this image; the ReLU baseline needs ${dense.toFixed(2)} µJ, ` +
    `or ${skipped.toFixed(2)} µJ if it skips zeros`;
  drawBars(result.probabilities, about.classes, result.best);
  drawRaster(result.spikes);
}

// The ten test images, for the test of this page: what the browser answers beside what PyTorch answered.
async function test(network) {
  const found = [];
  for (const { pixels, ...expected } of network.about.tests) {
    const { best, energy } = await network.run(pixels);
    found.push({ expected, class: best, energy });
  }
  const output = document.createElement("pre");
  output.id = "tests";
  output.textContent = JSON.stringify(found);
  page.append(output);
}

async function main() {
  let network;
  try {
    network = await Network.load();
  } catch (error) {
    say(`The network did not load (${error.message}). Run python examples/browser.py before mkdocs build.`);
    return;
  }
  let running = false;
  let waiting = false;
  const update = async () => {
    if (running) {
      waiting = true; // the newest drawing is shown when this one is done
      return;
    }
    running = true;
    do {
      waiting = false;
      report(await network.run(pad.pixels()), network.about);
    } while (waiting);
    running = false;
  };
  const pad = new Pad(part("pad"), update);
  const open = async (file) => {
    try {
      pad.show(await createImageBitmap(file));
    } catch {
      say(`${file.name} is not an image that this browser reads.`);
    }
  };
  part("clear").addEventListener("click", () => (pad.clear(), update()));
  part("file").addEventListener("change", (event) => event.target.files[0] && open(event.target.files[0]));
  part("pad").addEventListener("dragover", (event) => event.preventDefault());
  part("pad").addEventListener("drop", (event) => {
    event.preventDefault();
    if (event.dataTransfer.files[0]) open(event.dataTransfer.files[0]);
  });
  const samples = network.about.tests.map(({ pixels }, i) => {
    const button = document.createElement("button");
    button.textContent = network.about.classes[i];
    button.addEventListener("click", () => pad.showPixels(pixels));
    return button;
  });
  part("samples").append(...samples);
  say("Draw a digit, drop an image on the square, or choose a test image.");
  if (new URLSearchParams(location.search).has("test")) await test(network);
  pad.showPixels(network.about.tests[3].pixels);
}

main();
