// What follows from figures of money and of decisions: pure.
import type { GuestVerdict, Ledger, LedgerLine } from "../api/types";
import type { Stay } from "./derive";

/** What the same would have cost more on demand; null where nothing was paid that can be compared. */
export function saved(ledger: Ledger | null | undefined): number | null {
  const totals = ledger?.totals;
  return totals && totals.on_demand_nanousd > 0 ? totals.on_demand_nanousd - totals.comparable_paid_nanousd : null;
}

const DAY_MS = 86_400_000;

/** When the day began in which the ledger ends: by the clock on the wall where it is kept by that, else by the feed's. */
export function dayBegan(clock: Ledger["clock"], toMs: number): number {
  return clock === "wall" ? new Date(toMs).setHours(0, 0, 0, 0) : toMs - (toMs % DAY_MS);
}

export interface Chosen {
  /** The market that policies chose for most guests. */
  chosen: string | null;
  runnerUp: string | null;
  /** Guests for which each market was chosen, most first. */
  markets: [string, number][];
  moves: GuestVerdict[];
}

/** What policies chose, put together. */
export function chosen(verdicts: GuestVerdict[]): Chosen {
  const count = (names: (string | null | undefined)[]): [string, number][] => {
    const counts = new Map<string, number>();
    for (const name of names) if (name) counts.set(name, (counts.get(name) ?? 0) + 1);
    return [...counts].sort((a, b) => b[1] - a[1] || a[0].localeCompare(b[0]));
  };
  const markets = count(verdicts.map((one) => one.chosen));
  const best = markets[0]?.[0] ?? null;
  const next = count(verdicts.filter((one) => one.chosen === best).map((one) => one.runner_up));
  return { chosen: best, runnerUp: next[0]?.[0] ?? null, markets, moves: verdicts.filter((one) => one.is_move) };
}

/** A stay in the ledger: lines of one host that follow each other. */
export interface PaidStay { host: string; from: number; until: number; paid: number; unpriced: number }

/** What was paid for a guest, stay by stay, oldest first: what ran, and what was kept free on its way there. */
export function paidStays(lines: LedgerLine[]): PaidStay[] {
  const found: PaidStay[] = [];
  const own = lines.filter((line) => line.kind === "runs").sort((a, b) => a.from_ms - b.from_ms);
  for (const line of own) {
    let last = found[found.length - 1];
    if (!last || last.host !== line.host || last.until !== line.from_ms) {
      last = { host: line.host, from: line.from_ms, until: line.from_ms, paid: 0, unpriced: 0 };
      found.push(last);
    }
    last.until = line.to_ms;
    if (line.paid_nanousd === null || line.paid_nanousd === undefined) last.unpriced += line.to_ms - line.from_ms;
    else last.paid += line.paid_nanousd;
  }
  for (const line of lines) {
    if ((line.kind !== "egress" && line.kind !== "incoming") || !line.paid_nanousd) continue;
    // Paid for the way there: by the stay that it led to, or where none followed by the one before.
    const before = found.filter((stay) => stay.from <= line.from_ms).length - 1;
    const isThere = line.kind === "egress" ? found[before]?.host !== line.host : found[before]?.host === line.host;
    const stay = (isThere ? found[before] : found[before + 1]) ?? found[Math.max(0, before)];
    if (stay) stay.paid += line.paid_nanousd;
  }
  return found;
}

/**
 * What each stay cost; null where the ledger has nothing of it. By the clock on the wall times meet; a feed's clock has other times, and
 * there the stays are taken in their order, newest first, as far as the hosts are the same.
 */
export function priceStays(stays: Stay[], paid: PaidStay[], clock: Ledger["clock"]): (PaidStay | null)[] {
  const found: (PaidStay | null)[] = stays.map(() => null);
  if (clock === "wall") {
    for (const one of paid) {
      let [best, most] = [-1, 0];
      stays.forEach((stay, at) => {
        const both = stay.host === one.host ? Math.min(stay.until, one.until) - Math.max(stay.from, one.from) : 0;
        if (both > most) [best, most] = [at, both];
      });
      if (best < 0) continue;
      const before = found[best];
      found[best] = before ? { ...one, paid: before.paid + one.paid, unpriced: before.unpriced + one.unpriced } : { ...one };
    }
    return found;
  }
  let at = paid.length - 1;
  for (let index = stays.length - 1; index >= 0 && at >= 0; index -= 1) {
    const stay = stays[index]!;
    if (!stay.host) continue;
    if (paid[at]!.host !== stay.host) break;
    found[index] = paid[at]!;
    at -= 1;
  }
  return found;
}
