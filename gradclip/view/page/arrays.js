// Arrays as the answers hold them (see arrays.py), unpacked.

const TYPES = {
  f4: Float32Array,
  f8: Float64Array,
  i4: Int32Array,
  u1: Uint8Array,
};

const TOO_OLD =
  "This browser is too old for the page: it cannot unpack numbers (DecompressionStream). Take a newer one.";
const DAMAGED =
  "These numbers cannot be read: they are damaged, or of another version of gradclip.";

/** Return the values of a packed array as a typed array. */
export async function unpacked(packed) {
  try {
    return await values(packed);
  } catch {
    throw new Error(typeof DecompressionStream === "undefined" ? TOO_OLD : DAMAGED);
  }
}

async function values(packed) {
  if (packed.data === undefined) {
    return Float64Array.from(
      { length: packed.length },
      (_, index) => packed.first + packed.distance * index,
    );
  }
  const Type = TYPES[packed.type];
  const planes = await inflated(
    Uint8Array.from(atob(packed.data), (letter) => letter.charCodeAt(0)),
  );
  const size = Type.BYTES_PER_ELEMENT;
  const count = planes.length / size;
  const bytes = new Uint8Array(planes.length);
  // The first bytes of all elements come first, then the second bytes of all, and so on.
  for (let plane = 0; plane < size; plane += 1) {
    for (let index = 0; index < count; index += 1)
      bytes[index * size + plane] = planes[plane * count + index];
  }
  return new Type(bytes.buffer);
}

async function inflated(bytes) {
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

/** Return the index of the first entry that is not below a value, in rising numbers. */
export function firstNotBelow(numbers, value) {
  let [begin, end] = [0, numbers.length];
  while (begin < end) {
    const middle = (begin + end) >> 1;
    if (numbers[middle] < value) begin = middle + 1;
    else end = middle;
  }
  return begin;
}
