// Scales from numbers to pixels, their ticks, and numbers as text.

/** A scale of an axis: values to pixels and back. */
export class Scale {
  /**
   * @param low First value of the axis; above 0 if it is logarithmic.
   * @param high Last value, above the first.
   * @param start Pixel of the first value.
   * @param end Pixel of the last value.
   */
  constructor(low, high, start, end, logarithmic = false) {
    if (logarithmic) {
      // Room around the smallest and the largest numbers there are would end at 0 and at infinity.
      low = Math.max(low, Number.MIN_VALUE);
      high = Math.max(Math.min(high, Number.MAX_VALUE), 2 * low * (high <= low));
    }
    Object.assign(this, { low, high, start, end, logarithmic });
    this._warp = logarithmic ? Math.log10 : (value) => value;
    this._from = this._warp(low);
    this._factor = (end - start) / (this._warp(high) - this._from);
  }

  /** Return the pixel of a value; one that a logarithmic axis cannot have lies at its start. */
  at(value) {
    if (this.logarithmic && !(value > 0)) return this.start;
    return this.start + (this._warp(value) - this._from) * this._factor;
  }

  /** Return the value at a pixel. */
  value(pixel) {
    const warped = this._from + (pixel - this.start) / this._factor;
    return this.logarithmic ? 10 ** warped : warped;
  }

  /** Return at most so many round values of the axis. */
  ticks(most) {
    return this.logarithmic
      ? logarithmicTicks(this.low, this.high, most)
      : linearTicks(this.low, this.high, most);
  }
}

/** Return round values of a range at equal distances. */
export function linearTicks(low, high, most, least = 0) {
  if (!(high > low)) return [low];
  const raw = (high - low) / Math.max(most, 1);
  const power = 10 ** Math.floor(Math.log10(raw));
  if (!(power > 0)) return [low]; // no number is as small as their distance
  const distance = Math.max(
    [1, 2, 5, 10].map((digit) => digit * power).find((each) => each >= raw * 0.999),
    least,
  );
  const ticks = [];
  for (
    let index = Math.ceil(low / distance - 1e-9);
    index * distance <= high + distance * 1e-9;
    index += 1
  ) {
    ticks.push(Number((index * distance).toPrecision(12)));
  }
  return ticks;
}

function logarithmicTicks(low, high, most) {
  const decades = Math.log10(high) - Math.log10(low);
  if (decades < 0.7) return linearTicks(low, high, most);
  const stride = Math.max(1, Math.ceil(decades / most));
  const digits =
    decades * 6 <= most
      ? [1, 1.5, 2, 3, 5, 7]
      : decades * 3 <= most
        ? [1, 2, 5]
        : decades * 2 <= most
          ? [1, 3]
          : [1];
  const ticks = [];
  for (let decade = Math.floor(Math.log10(low)); decade <= Math.log10(high); decade += 1) {
    if (decade % stride) continue;
    for (const digit of digits) {
      const tick = Number(`${digit}e${decade}`);
      if (tick >= low * 0.999999 && tick <= high * 1.000001) ticks.push(tick);
    }
  }
  return ticks;
}

const SUPERSCRIPTS = "⁰¹²³⁴⁵⁶⁷⁸⁹";

/** Return a tick of an axis as text, with powers of ten for very small and large ones. */
export function tickLabel(value) {
  const [digits, exponent] = value.toExponential(5).split("e");
  if (value === 0 || Math.abs(exponent) < 4 || Number(digits) !== 1) return number(value);
  const raised = [...String(Math.abs(exponent))].map((digit) => SUPERSCRIPTS[digit]).join("");
  return `10${exponent < 0 ? "⁻" : ""}${raised}`;
}

/** Return a number with at most so many digits, in the usual spelling of programs. */
export function number(value, digits = 4) {
  if (value === null || Number.isNaN(value)) return "–";
  if (!Number.isFinite(value)) return value > 0 ? "∞" : "−∞";
  const size = Math.abs(value);
  if (size !== 0 && (size < 1e-4 || size >= 1e6)) {
    return value
      .toExponential(digits - 1)
      .replace(/\.?0+e/, "e")
      .replace("e+", "e");
  }
  return String(Number(value.toPrecision(digits)));
}

/** Return a whole number with separators. */
export function whole(value) {
  return Math.round(value).toLocaleString("en-US");
}

/** Return a share in percent, with enough digits to tell it from 0 and from all. */
export function percent(share) {
  if (!(share > 0)) return "0 %";
  if (share === 1) return "100 %";
  const digits = share > 0.99 ? 4 : 2;
  return `${Number((100 * share).toPrecision(digits))} %`;
}

/** Return the smallest and the largest value of a bucket as text. */
export function between(extremes) {
  if (!extremes || Number.isNaN(extremes[0])) return "–";
  const [low, high] = extremes;
  return low === high ? number(low) : `${number(low, 3)} … ${number(high, 3)}`;
}
