// Of all operations that ever were the page has those under way, the newest without a gap, and what was asked for besides.
import type { Operation } from "../api/types";
import { isEnded } from "./derive";

export interface Page<T> { items: T[]; next_page?: string | null }

/** How far back the newest are known without a gap, and where the next older ones are; `null`: there are none. */
export interface Reach { back_to: number; next: string | null }

export const NONE: Reach = { back_to: Infinity, next: null };

/** How far the newest reach, when a page of them comes anew to what is known. */
export function reached(known: ReadonlyMap<string, Operation>, reach: Reach, page: Page<Operation>): Reach {
  const next = page.next_page ?? null;
  if (next === null) return { back_to: -Infinity, next };
  const meets = page.items.some((one) => one.created_at_ms >= reach.back_to && known.has(one.id));
  return meets ? reach : { back_to: oldest(page.items, Infinity), next };
}

/** How far they reach with the page after them. */
export function further(reach: Reach, page: Page<Operation>): Reach {
  const next = page.next_page ?? null;
  return { back_to: next === null ? -Infinity : oldest(page.items, reach.back_to), next };
}

const oldest = (items: Operation[], than: number): number => items.reduce((least, one) => Math.min(least, one.created_at_ms), than);

/** Those that a listing shows, newest first: without a gap, and whatever is under way. */
export function inReach(all: Iterable<Operation>, reach: Reach): Operation[] {
  return newestFirst([...all].filter((one) => one.created_at_ms >= reach.back_to || !isEnded(one.phase)));
}

export function newestFirst(found: Operation[]): Operation[] {
  return found.sort((a, b) => b.created_at_ms - a.created_at_ms || (a.id < b.id ? 1 : -1));
}
