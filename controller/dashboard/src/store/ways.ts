// What follows from the ways between hosts: pure, so that it is tested without a browser.
import type { HostLink } from "../api/types";

/** A round trip, from microseconds. */
export function roundTrip(us: number): string {
  if (us < 1000) return `${us} µs`;
  const ms = us / 1000;
  return `${ms < 10 ? ms.toFixed(1) : Math.round(ms)} ms`;
}

export function lossText(loss: number | null | undefined): string {
  if (loss === null || loss === undefined) return "–";
  const percent = loss * 100;
  return percent > 0 && percent < 0.1 ? "< 0.1 % lost" : `${percent.toFixed(percent < 10 ? 1 : 0)} % lost`;
}

export interface Way {
  /** The clouds, by name, the smaller id first; the same one twice for ways within it. */
  id: string;
  from: string;
  to: string;
  fromName: string;
  toName: string;
  state: "answers" | "silent" | "partly_silent" | "not_measured";
  rttUs: number | null;
  loss: number | null;
  /** Links between hosts, and those of them that answer. */
  links: number;
  answering: number;
}

/** The ways between clouds, of the links between their hosts: the median round trip, all packets together. */
export function ways(links: Iterable<HostLink>): Way[] {
  const found = new Map<string, HostLink[]>();
  for (const link of links) {
    const [a, b] = link.from_cloud < link.to_cloud ? [link.from_cloud, link.to_cloud] : [link.to_cloud, link.from_cloud];
    const key = `${a}.${b}`;
    found.set(key, [...(found.get(key) ?? []), link]);
  }
  return [...found].map(([id, own]) => {
    const first = own[0]!;
    const isForward = first.from_cloud <= first.to_cloud;
    const answering = own.filter((link) => link.state === "answers");
    const silent = own.filter((link) => link.state === "silent").length;
    const times = answering.map((link) => link.rtt_us).filter((us): us is number => typeof us === "number").sort((a, b) => a - b);
    const [sent, resent] = answering.reduce<[number, number]>(([sent, resent], link) => [sent + link.sent, resent + link.resent], [0, 0]);
    const state: Way["state"] = answering.length > 0 ? (silent > 0 ? "partly_silent" : "answers") : silent > 0 ? "silent" : "not_measured";
    return {
      id,
      from: isForward ? first.from_cloud : first.to_cloud,
      to: isForward ? first.to_cloud : first.from_cloud,
      fromName: isForward ? first.from_cloud_name : first.to_cloud_name,
      toName: isForward ? first.to_cloud_name : first.from_cloud_name,
      state,
      rttUs: times[Math.floor(times.length / 2)] ?? null,
      // A share of few packets is no share.
      loss: sent >= 20 ? resent / sent : null,
      links: own.length,
      answering: answering.length,
    };
  });
}

export function wayText(way: Way): string {
  if (way.state === "not_measured") return "not measured";
  if (way.state === "silent") return "no answer";
  const parts = [way.rttUs === null ? "answers" : roundTrip(way.rttUs)];
  if (way.loss !== null) parts.push(lossText(way.loss));
  if (way.state === "partly_silent") parts.push(`${way.links - way.answering} of ${way.links} silent`);
  return parts.join(", ");
}

/** The better measured direction between two hosts. */
export function between(links: Iterable<HostLink>, a: string, b: string): HostLink | undefined {
  let best: HostLink | undefined;
  for (const link of links) {
    const isIt = (link.from === a && link.to === b) || (link.from === b && link.to === a);
    if (!isIt) continue;
    const rank = (one: HostLink) => ({ answers: 2, silent: 1, not_measured: 0 })[one.state];
    if (!best || rank(link) > rank(best)) best = link;
  }
  return best;
}

export function linkText(link: HostLink | undefined): string {
  if (!link || link.state === "not_measured") return "not measured";
  if (link.state === "silent") return "no answer";
  return [link.rtt_us === null || link.rtt_us === undefined ? "answers" : roundTrip(link.rtt_us), ...(link.loss === null || link.loss === undefined ? [] : [lossText(link.loss)])].join(", ");
}
