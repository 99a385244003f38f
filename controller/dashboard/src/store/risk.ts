// What a host and a market cost and how risky they are, from what was seen: pure, so that it is tested without a browser.
import type { Evacuation, Host, LedgerLine, Market, Renting } from "../api/types";

export interface Priced { market: Market | undefined; renting: Renting | undefined }

/** What a host is rented as, and its market. */
export function priced(host: Host, rentings: Iterable<Renting>, markets: Market[]): Priced {
  let renting: Renting | undefined;
  for (const one of rentings) if (one.host === host.id && one.state !== "ended") renting = one;
  const market = renting && markets.find((one) => one.cloud === renting!.cloud && one.instance_type === renting!.instance_type && one.tenure === renting!.tenure);
  return { market, renting };
}

/** How hosts are paid for, as far as is known: as they are rented, or by the market that the ledger counts those in that joined by themselves. */
export function tenures(hosts: Iterable<Host>, rentings: Iterable<Renting>, lines: LedgerLine[]): ReadonlyMap<string, Market["tenure"]> {
  const found = new Map<string, Market["tenure"]>();
  // Newest last.
  for (const line of lines) {
    if (line.market?.endsWith("/spot")) found.set(line.host, "spot");
    else if (line.market?.endsWith("/on_demand")) found.set(line.host, "on_demand");
  }
  for (const one of rentings) if (one.state !== "ended") found.set(one.host, one.tenure);
  const living = new Set([...hosts].filter((host) => host.state !== "removed").map((host) => host.id));
  return new Map([...found].filter(([host]) => living.has(host)));
}

export interface Risk { tone: "good" | "warn" | "bad" | ""; text: string }

/** Whether a host is taken back, and whether its guests could leave in time; none where nobody takes it back. */
export function hostRisk(host: Host, renting: Renting | undefined, evacuations: Iterable<Evacuation>): Risk {
  if (host.notice && host.state !== "removed") {
    return host.notice.kind === "interruption" ? { tone: "bad", text: "is taken back" } : { tone: "warn", text: "may be taken back soon" };
  }
  const own = [...evacuations].filter((one) => one.host === host.id);
  if (own.length === 0 && renting?.tenure !== "spot") return { tone: "", text: "–" };
  const count = (state: Evacuation["state"]) => own.filter((one) => one.state === state).length;
  const [late, unknown] = [count("late"), count("unknown")];
  if (late > 0) return { tone: "bad", text: `${late} of ${own.length} too late` };
  if (unknown > 0) return { tone: "warn", text: `${unknown} of ${own.length} not measured` };
  return { tone: "good", text: own.length === 0 ? "spot, no guest" : "all leave in time" };
}

/** How often machines of ours were taken in a market. */
export function marketRisk(market: Market): Risk {
  if (market.tenure === "on_demand") return { tone: "", text: "–" };
  const seen = market.seen;
  if (!seen) return { tone: "", text: "not measured" };
  const hours = seen.ran_ms / 3_600_000;
  const ran = hours < 1 ? `${Math.round(seen.ran_ms / 60_000)} min` : `${hours < 10 ? hours.toFixed(1) : Math.round(hours)} h`;
  const announced = seen.announced > 0 ? `, ${seen.announced} announced` : "";
  return { tone: seen.announced > 0 ? "bad" : seen.taken > 0 ? "warn" : "good", text: `${seen.taken} taken in ${ran}${announced}` };
}
