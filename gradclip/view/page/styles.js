// Colours and marks: those of Okabe and Ito, which colour-blind people can tell apart. Runs differ by a
// marker too, and the curves of a run by their line: thin, bold, dashed.

const RUN_COLOURS = [
  "#0072b2",
  "#d55e00",
  "#009e73",
  "#cc79a7",
  "#56b4e9",
  "#e69f00",
  "#8c6d1f",
  "#7f7f7f",
];
const ON_DARK = [
  "#56b4e9",
  "#ff8a3d",
  "#2fc79a",
  "#e08fc0",
  "#a6dbf7",
  "#f2b84b",
  "#c8a64b",
  "#b0b0b0",
];
const MARKERS = ["circle", "square", "triangle", "diamond"];

/** Return the colour of a run by its place in the list, lighter on a dark ground. */
export function runColour(index, isDark) {
  return (isDark ? ON_DARK : RUN_COLOURS)[index % RUN_COLOURS.length];
}

/** Return the shape that marks the curves of a run. */
export function runMarker(index) {
  return MARKERS[(index + Math.floor(index / RUN_COLOURS.length)) % MARKERS.length];
}

/** The colours of a page's theme, as its style sheet defines them. */
export class Palette {
  constructor(root) {
    const style = getComputedStyle(root);
    for (const name of [
      "ink",
      "muted",
      "grid",
      "surface",
      "before",
      "after",
      "accent",
      "warning",
      "skipped",
    ]) {
      this[name] = style.getPropertyValue(`--${name}`).trim();
    }
    this.font = style.fontFamily;
  }
}

/** Draw a marker around a point. */
export function drawMarker(context, shape, x, y, size) {
  const half = size / 2;
  context.beginPath();
  if (shape === "circle") context.arc(x, y, half, 0, 2 * Math.PI);
  else if (shape === "square") context.rect(x - half * 0.9, y - half * 0.9, size * 0.9, size * 0.9);
  else {
    context.moveTo(x, y - half * 1.15);
    context.lineTo(x + half * 1.1, shape === "triangle" ? y + half * 0.85 : y);
    if (shape === "diamond") context.lineTo(x, y + half * 1.15);
    context.lineTo(x - half * 1.1, shape === "triangle" ? y + half * 0.85 : y);
    context.closePath();
  }
  context.fill();
}

/** Return a canvas with the marker of a run, to stand before its name. */
export function swatch(run) {
  const canvas = document.createElement("canvas");
  canvas.className = "swatch";
  canvas.width = canvas.height = 28;
  canvas.setAttribute("aria-hidden", "true");
  const context = canvas.getContext("2d");
  context.scale(2, 2);
  context.fillStyle = run.colour;
  drawMarker(context, run.marker, 7, 7, 10);
  return canvas;
}

// Viridis, at nine points: dark is small, light is large, and it reads in grey as well.
const VIRIDIS = [
  [68, 1, 84],
  [71, 44, 122],
  [59, 81, 139],
  [44, 113, 142],
  [33, 144, 141],
  [39, 173, 129],
  [92, 200, 99],
  [170, 220, 50],
  [253, 231, 37],
];

/** Red, green and blue of 256 shares from 0 to 1. */
const HEAT = Array.from({ length: 256 }, (_, index) => {
  const place = (index / 255) * (VIRIDIS.length - 1);
  const below = Math.min(Math.floor(place), VIRIDIS.length - 2);
  return VIRIDIS[below].map(
    (value, part) => value + (VIRIDIS[below + 1][part] - value) * (place - below),
  );
});

/** Return red, green and blue of a share between 0 and 1. */
export function heat(share) {
  return HEAT[Math.round(Math.min(Math.max(share, 0), 1) * 255)];
}
