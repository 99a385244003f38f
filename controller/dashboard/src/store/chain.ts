// Whether the audit trail holds: each event's hash is that of its own text, and names the hash of the event before.
import type { Event } from "../api/types";
import { blake3 } from "./blake3";

/** An event as it was told, letter by letter: its hash is over that text. */
export interface Told { event: Event; text: string }

/** Whether the event's hash is that of its text. */
export function isIntact({ event, text }: Told): boolean {
  const end = `"hash":"${event.hash}"}`;
  if (!text.endsWith(end)) return false;
  const bare = `${text.slice(0, -end.length)}"hash":""}`;
  return blake3(new TextEncoder().encode(bare)) === event.hash;
}

export interface Verdict {
  checked: number;
  /** Numbers of events whose hash is not theirs, or that do not follow the one before. */
  broken: number[];
  /** How often a number is missing: to a token of a project what belongs to others is. */
  gaps: number;
}

/** Checks events in the order of their numbers; those that are already known to be intact are not hashed again. */
export function verify(told: Iterable<Told>, known: WeakSet<Event>): Verdict {
  const verdict: Verdict = { checked: 0, broken: [], gaps: 0 };
  let before: Event | undefined;
  for (const one of told) {
    const { event } = one;
    if (!known.has(event) && isIntact(one)) known.add(event);
    const follows = !before || event.seq !== before.seq + 1 || event.previous_hash === before.hash;
    const beginsWell = event.seq !== 1 || event.previous_hash === "0".repeat(64);
    if (!known.has(event) || !follows || !beginsWell) verdict.broken.push(event.seq);
    if (before && event.seq !== before.seq + 1) verdict.gaps += 1;
    verdict.checked += 1;
    before = event;
  }
  return verdict;
}
