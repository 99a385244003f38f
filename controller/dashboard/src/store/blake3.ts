// BLAKE3 (hash and derive-key mode, 32 bytes out), by the specification of O'Connor, Aumasson, Neves and Wilcox-O'Hearn, 2020:
// the browser has none, and the audit trail and the points of volumes are chained with it.

const IV = [0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a, 0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19];
const ORDER = [2, 6, 3, 10, 7, 0, 4, 13, 1, 11, 12, 5, 9, 14, 15, 8];
const [CHUNK_START, CHUNK_END, PARENT, ROOT, KEY_CONTEXT, KEY_MATERIAL] = [1, 2, 4, 8, 32, 64] as const;
const [BLOCK, CHUNK] = [64, 1024] as const;

const turn = (value: number, by: number): number => (value >>> by) | (value << (32 - by));

function compress(chain: ArrayLike<number>, block: Uint32Array, counter: number, length: number, flags: number): Uint32Array {
  const v = new Uint32Array(16);
  v.set(Array.from(chain), 0);
  v.set(IV.slice(0, 4), 8);
  v.set([counter >>> 0, Math.floor(counter / 2 ** 32), length, flags], 12);
  const mix = (a: number, b: number, c: number, d: number, x: number, y: number) => {
    v[a] = v[a]! + v[b]! + x;
    v[d] = turn(v[d]! ^ v[a]!, 16);
    v[c] = v[c]! + v[d]!;
    v[b] = turn(v[b]! ^ v[c]!, 12);
    v[a] = v[a]! + v[b]! + y;
    v[d] = turn(v[d]! ^ v[a]!, 8);
    v[c] = v[c]! + v[d]!;
    v[b] = turn(v[b]! ^ v[c]!, 7);
  };
  let m = block;
  for (let round = 0; round < 7; round += 1) {
    for (let at = 0; at < 4; at += 1) mix(at, at + 4, at + 8, at + 12, m[2 * at]!, m[2 * at + 1]!);
    for (let at = 0; at < 4; at += 1) mix(at, 4 + ((at + 1) % 4), 8 + ((at + 2) % 4), 12 + ((at + 3) % 4), m[8 + 2 * at]!, m[9 + 2 * at]!);
    m = Uint32Array.from(ORDER, (from) => m[from]!);
  }
  return Uint32Array.from({ length: 8 }, (_, at) => v[at]! ^ v[at + 8]!);
}

function words(bytes: Uint8Array): Uint32Array {
  const out = new Uint32Array(16);
  bytes.forEach((byte, at) => { out[at >> 2]! |= byte << (8 * (at & 3)); });
  return out;
}

/** The chaining value of a subtree; of the whole input it is the hash. */
function tree(bytes: Uint8Array, first: number, root: number, key: ArrayLike<number> = IV, mode = 0): Uint32Array {
  if (bytes.length <= CHUNK) {
    let chain = key;
    const blocks = Math.max(1, Math.ceil(bytes.length / BLOCK));
    for (let at = 0; at < blocks; at += 1) {
      const piece = bytes.subarray(at * BLOCK, (at + 1) * BLOCK);
      const flags = (at === 0 ? CHUNK_START : 0) | (at === blocks - 1 ? CHUNK_END | root : 0) | mode;
      chain = compress(chain, words(piece), first, piece.length, flags);
    }
    return chain as Uint32Array;
  }
  // The left side is the largest power of two of chunks that leaves something to the right.
  let left: number = CHUNK;
  while (left * 2 < bytes.length) left *= 2;
  const block = new Uint32Array(16);
  block.set(tree(bytes.subarray(0, left), first, 0, key, mode), 0);
  block.set(tree(bytes.subarray(left), first + left / CHUNK, 0, key, mode), 8);
  return compress(key, block, 0, BLOCK, PARENT | root | mode);
}

const hexOf = (found: Uint32Array): string => Array.from(found, (word) => [0, 8, 16, 24].map((at) => ((word >>> at) & 0xff).toString(16).padStart(2, "0")).join("")).join("");

/** The hash, as hex. */
export const blake3 = (bytes: Uint8Array): string => hexOf(tree(bytes, 0, ROOT));

/** The key that is derived from the bytes in a context of their own, as hex. */
export function blake3Derived(context: string, bytes: Uint8Array): string {
  const key = tree(new TextEncoder().encode(context), 0, ROOT, IV, KEY_CONTEXT);
  return hexOf(tree(bytes, 0, ROOT, key, KEY_MATERIAL));
}
