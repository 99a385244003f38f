// Whether a volume's history is what was written: the same check as `supercloud volume history --verify` makes, in the page itself.
import type { VolumeHistory, VolumePoint } from "../api/types";
import { blake3, blake3Derived } from "./blake3";

const NO_HASH = "0".repeat(64);
const CONTEXT = "supercloud volume history v1: point";

const fromHex = (hex: string): Uint8Array => Uint8Array.from(hex.match(/../g) ?? [], (two) => parseInt(two, 16));
const hashed = (text: string): Uint8Array => fromHex(blake3(new TextEncoder().encode(text)));
/** The 16 bytes of an id's UUID. */
const uuid = (id: string): Uint8Array => fromHex(id.slice(4).replaceAll("-", ""));

function u64(value: number): Uint8Array {
  const bytes = new Uint8Array(8);
  new DataView(bytes.buffer).setBigUint64(0, BigInt(value), true);
  return bytes;
}

/** The hash of a point after `previous`: over the hash before and all fields, each of a fixed length. */
export function pointHash(volume: string, previous: string, point: VolumePoint): string {
  const parts = [hashed(previous), uuid(volume)];
  for (const number of [point.number, point.at_ms, point.tick, point.epoch, point.version, point.stored_bytes]) parts.push(u64(number));
  parts.push(hashed(point.root), uuid(point.cloud));
  if (point.memory) parts.push(hashed(point.memory.root), u64(point.memory.bytes), hashed(point.memory.format));
  const all = new Uint8Array(parts.reduce((sum, part) => sum + part.length, 0));
  let at = 0;
  for (const part of parts) {
    all.set(part, at);
    at += part.length;
  }
  return blake3Derived(CONTEXT, all);
}

export interface Verified { points: number; thinned: number; fault: string }

/** Checks a history from its first point to its newest; `fault` is empty where it holds, else says where it does not first. */
export function verifyPoints(history: VolumeHistory): Verified {
  const found: Verified = { points: 0, thinned: 0, fault: "" };
  const fail = (fault: string): Verified => ({ ...found, fault });
  const [points, rows] = [[...history.points], [...history.thinned]];
  let hash = NO_HASH;
  let number = 1;
  let last: VolumePoint | undefined;
  for (;;) {
    const [point, row] = [points[0], rows[0]];
    if (!point && !row) break;
    if (point?.number === number && row?.from !== number) {
      if (last && (point.at_ms < last.at_ms || (point.at_ms === last.at_ms && point.tick <= last.tick))) return fail(`point ${number} is not later than the point before it`);
      if (point.hash !== pointHash(history.volume, hash, point)) return fail(`point ${number} is not what was written, or not after what was written before it`);
      points.shift();
      last = point;
      hash = point.hash;
      found.points += 1;
      number += 1;
    } else if (row?.from === number && point?.number !== number && row.to >= row.from) {
      rows.shift();
      found.thinned += row.to - row.from + 1;
      hash = row.hash;
      number = row.to + 1;
    } else {
      return fail(Math.min(point?.number ?? Infinity, row?.from ?? Infinity) > number ? `point ${number} is missing, and is not said to be thinned out` : `point ${number} is out of its place`);
    }
  }
  if (number < history.next) return fail(`point ${number} is missing, and is not said to be thinned out`);
  if (number > history.next || hash !== history.head) return fail("the history ends elsewhere than with the last point that was written");
  return found;
}
