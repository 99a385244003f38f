// What follows from the records: pure, so that it is tested without a browser.
import type { Cloud, Evacuation, Event, Guest, Host, Operation, Phase, WhoAmI } from "../api/types";

export const PHASES: Phase[] = ["plan", "prepare", "copy", "switch", "resume", "finish"];

export function isEnded(phase: Phase): boolean {
  return phase === "done" || phase === "rolled_back" || phase === "failed";
}

/** How far an operation is, 0 to 1; never backwards, because phases are not and bytes within one are not. */
export function fraction(operation: Operation): number {
  if (isEnded(operation.phase)) return 1;
  // A mirror has no end to come to: whole is a standby that could take over.
  if (operation.kind === "guest_mirror" && (operation.progress.mirror?.committed ?? 0) > 0) return 1;
  const at = PHASES.indexOf(operation.phase);
  const starts = [0, 0.05, 0.1, 0.75, 0.8, 0.85, 1];
  const begin = starts[at] ?? 0;
  const end = starts[at + 1] ?? 1;
  const { memory_total_bytes: total = 0, memory_remaining_bytes: remaining = 0, round = 0 } = operation.progress;
  if (operation.phase !== "copy" || total <= 0) return begin;
  // Later rounds are shorter; each takes half of what is left of the bar.
  const done = 1 - Math.min(1, remaining / total);
  const inRound = round <= 1 ? done * 0.7 : 0.7 + 0.3 * (1 - 0.5 ** (round - 1));
  return begin + (end - begin) * Math.min(1, inRound);
}

export interface Alarm {
  level: "bad" | "warn";
  what: string;
  text: string;
  link: string;
}

/** Whether anything is wrong, worst first. */
export function alarms(guests: Iterable<Guest>, hosts: Iterable<Host>, operations: Iterable<Operation>, evacuations: Iterable<Evacuation>, nowMs: number): Alarm[] {
  const found: Alarm[] = [];
  const names = new Map<string, string>();
  const unreachable = new Set<string>();
  for (const host of hosts) {
    if (host.notice && host.state !== "removed") {
      const is_taken = host.notice.kind === "interruption";
      const when = host.notice.at_ms ? `at ${new Date(host.notice.at_ms).toLocaleTimeString()}` : "soon";
      found.push({
        level: is_taken ? "bad" : "warn", what: host.name, link: `#/hosts/${host.name}`,
        text: is_taken ? `its provider takes it back ${when}` : "its provider says that it may be taken back soon",
      });
    }
    if (host.state !== "unreachable") continue;
    unreachable.add(host.id);
    found.push({
      level: "bad", what: host.name, link: `#/hosts/${host.name}`,
      text: "its agent is away; its guests may well run on, but cannot be moved",
    });
  }
  for (const guest of guests) {
    names.set(guest.id, guest.name);
    if (guest.alarm) found.push({ level: "bad", what: guest.name, text: guest.alarm, link: `#/guests/${guest.id}` });
    else if (guest.state === "lost") {
      found.push({ level: "bad", what: guest.name, text: "it is lost: start it again from its volumes", link: `#/guests/${guest.id}` });
    }
  }
  for (const one of evacuations) {
    if (one.state !== "late") continue;
    found.push({ level: "bad", what: names.get(one.guest) ?? one.guest, link: `#/guests/${one.guest}`, text: `could not leave ${one.host_name} in time: ${one.detail}` });
  }
  const DAY = 86_400_000;
  for (const operation of operations) {
    const ended = operation.ended_at_ms ?? operation.updated_at_ms;
    if (nowMs - ended > DAY) continue;
    const name = label(operation);
    const link = `#/operations/${operation.id}`;
    if (operation.phase === "failed") {
      found.push({ level: "bad", what: name, text: operation.error?.detail ?? "it failed", link });
    } else if (operation.phase === "rolled_back" && !operation.is_cancel_requested) {
      found.push({ level: "warn", what: name, text: operation.error?.detail ?? "it was rolled back", link });
    }
  }
  return found.sort((a, b) => (a.level === b.level ? 0 : a.level === "bad" ? -1 : 1));
}

export interface Stay {
  /** Where; null while it stood still: frozen, stopped or lost. */
  host: string | null;
  /** What it was while it ran nowhere. */
  still: string;
  from: number;
  until: number;
  /** The pause with which it came here, and the operation that brought it. */
  downtime: number | null;
  operation: string | null;
}

/** The places that a guest lived at, oldest first, by the switches among the events, which are in order. */
export function stays(events: Iterable<Event>, operations: ReadonlyMap<string, Operation>, nowMs: number): Stay[] {
  const found: Stay[] = [];
  for (const event of events) {
    if (event.kind !== "guest.switched") continue;
    const last = found[found.length - 1];
    if (last) last.until = event.at_ms;
    const owner = (event.data as { to?: { owner?: unknown } }).to?.owner;
    const still = typeof owner === "string" ? owner : owner && typeof owner === "object" ? (Object.keys(owner)[0] ?? "") : "";
    const operation = event.operation ? operations.get(event.operation) : undefined;
    const host = still === "lost" ? null : (event.host ?? null);
    const downtime = operation?.kind === "guest_migrate" ? (operation.progress.downtime_ms ?? null) : null;
    found.push({ host, still, from: event.at_ms, until: nowMs, downtime, operation: event.operation ?? null });
  }
  return found;
}

export interface Round { round: number; begun: number; took: number; sent: number; remaining: number; dirty: number; bandwidth: number }

/** Samples of an operation's progress, put together by round: what was sent in it, what remained at its end. */
export function rounds(samples: { at: number; round: number; sent: number; remaining: number; dirty: number; bandwidth: number }[]): Round[] {
  const found: Round[] = [];
  let sentBefore = 0;
  for (const sample of samples) {
    let last = found[found.length - 1];
    if (!last || last.round !== sample.round) {
      sentBefore = last ? sentBefore + last.sent : 0;
      if (last) last.took = sample.at - last.begun;
      last = { round: sample.round, begun: sample.at, took: 0, sent: 0, remaining: 0, dirty: 0, bandwidth: 0 };
      found.push(last);
    }
    last.took = sample.at - last.begun;
    last.sent = Math.max(0, sample.sent - sentBefore);
    last.remaining = sample.remaining;
    last.dirty = Math.max(last.dirty, sample.dirty);
    last.bandwidth = Math.max(last.bandwidth, sample.bandwidth);
  }
  return found.filter((round) => round.round > 0);
}

const KINDS: Record<string, string> = {
  image_import: "import", guest_start: "start", guest_stop: "stop", guest_delete: "delete",
  guest_migrate: "migrate", guest_mirror: "mirror", guest_freeze: "freeze", guest_thaw: "thaw",
  host_rent: "rent a host", host_return: "give a host back",
};

export function label(operation: Operation): string {
  return KINDS[operation.kind] ?? operation.kind.replace(/^guest_/, "").replaceAll("_", " ");
}

export interface Place {
  cloud: Cloud;
  hosts: { host: Host; guests: Guest[] }[];
}

/** Clouds with their hosts with their guests, each by name. */
export function places(clouds: Iterable<Cloud>, hosts: Iterable<Host>, guests: Iterable<Guest>): Place[] {
  const byName = <T extends { name: string }>(a: T, b: T) => a.name.localeCompare(b.name);
  const onHost = new Map<string, Guest[]>();
  for (const guest of guests) {
    if (guest.host && guest.state === "running") onHost.set(guest.host, [...(onHost.get(guest.host) ?? []), guest]);
  }
  const living = [...hosts].filter((host) => host.state !== "removed").sort(byName);
  return [...clouds].sort(byName).map((cloud) => ({
    cloud,
    hosts: living
      .filter((host) => host.cloud === cloud.id)
      .map((host) => ({ host, guests: (onHost.get(host.id) ?? []).sort(byName) })),
  }));
}

/** The value at a part of the sorted numbers (nearest rank); null of none. */
export function percentile(numbers: number[], part: number): number | null {
  if (numbers.length === 0) return null;
  const sorted = [...numbers].sort((a, b) => a - b);
  return sorted[Math.max(0, Math.ceil(part * sorted.length) - 1)] ?? null;
}

export interface Record30 {
  moves: number;
  rolledBack: number;
  failed: number;
  downtimeP50: number | null;
  downtimeP99: number | null;
  freezes: number;
}

/** How good the moves were that ended since `sinceMs`. */
export function record(operations: Iterable<Operation>, sinceMs: number): Record30 {
  const result: Record30 = { moves: 0, rolledBack: 0, failed: 0, downtimeP50: null, downtimeP99: null, freezes: 0 };
  const downtimes: number[] = [];
  for (const operation of operations) {
    if (!isEnded(operation.phase) || (operation.ended_at_ms ?? 0) < sinceMs) continue;
    if (operation.kind === "guest_freeze" && operation.phase === "done") result.freezes += 1;
    if (operation.kind !== "guest_migrate") continue;
    if (operation.phase === "done") {
      result.moves += 1;
      const downtime = operation.progress.downtime_ms;
      if (downtime !== null && downtime !== undefined) downtimes.push(downtime);
    } else if (operation.phase === "failed") result.failed += 1;
    else result.rolledBack += 1;
  }
  result.downtimeP50 = percentile(downtimes, 0.5);
  result.downtimeP99 = percentile(downtimes, 0.99);
  return result;
}

export function may(who: WhoAmI | null | undefined, what: "move" | "change" | "administer" | "system"): boolean {
  if (!who || who.token.guest) return false;
  const rank = { viewer: 0, policy: 1, operator: 2, admin: 3 }[who.token.role];
  const least = { move: 1, change: 2, administer: 3, system: 3 }[what];
  return rank >= least && (what !== "system" || !who.token.project);
}

/** Whether an event's text has all of the words, for the audit's filter. */
export function eventMatches(event: Event, words: string[]): boolean {
  const text = `${event.kind} ${event.actor} ${event.request_id} ${event.guest ?? ""} ${event.host ?? ""} ${event.operation ?? ""} ${JSON.stringify(event.data)}`;
  const low = text.toLowerCase();
  return words.every((word) => low.includes(word));
}
