// What follows from the records: pure, so that it is tested without a browser.
import type { Cloud, Evacuation, Event, Guest, GuestStay, GuestVerdict, Host, Operation, Phase, WhoAmI } from "../api/types";

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
export function alarms(guests: Iterable<Guest>, hosts: Iterable<Host>, operations: Iterable<Operation>, evacuations: Iterable<Evacuation>, verdicts: Iterable<GuestVerdict>, nowMs: number): Alarm[] {
  const found: Alarm[] = [];
  const names = new Map<string, string>();
  const [unreachable, busy] = [new Set<string>(), new Set<string>()];
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
    if (guest.operation) busy.add(guest.id);
    if (guest.alarm) found.push({ level: "bad", what: guest.name, text: guest.alarm, link: `#/guests/${guest.id}` });
    else if (guest.state === "lost") {
      found.push({ level: "bad", what: guest.name, text: "it is lost: start it again from its volumes", link: `#/guests/${guest.id}` });
    }
  }
  for (const one of evacuations) {
    if (one.state !== "late") continue;
    found.push({ level: "bad", what: names.get(one.guest) ?? one.guest, link: `#/guests/${one.guest}`, text: `could not leave ${one.host_name} in time: ${one.detail}` });
  }
  for (const one of verdicts) {
    // What its policy wants elsewhere and nobody moves is not where it is wanted.
    if (!one.is_move || busy.has(one.guest) || !names.has(one.guest)) continue;
    found.push({ level: "warn", what: one.guest_name, link: `#/guests/${one.guest}`, text: `is not where its policy wants it${one.chosen ? `, which is ${one.chosen}` : ""}: ${one.reason}` });
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
  /** Lost, or nothing where it was stopped or frozen. */
  still: string;
  from: number;
  until: number;
  /** The pause with which it came here, and the operation that brought it. */
  downtime: number | null;
  operation: string | null;
}

/** Where a guest lived, as the controller tells it. */
export const stays = (told: GuestStay[]): Stay[] => told.map((stay) => ({
  host: stay.host ?? null, still: stay.is_lost ? "lost" : "", from: stay.from_ms, until: stay.until_ms, downtime: stay.downtime_ms ?? null, operation: stay.operation ?? null,
}));

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
  group_migrate: "migrate a group", group_freeze: "freeze a group", group_thaw: "thaw a group",
  host_rent: "rent a host", host_return: "give a host back",
};

export function label(operation: Operation): string {
  return KINDS[operation.kind] ?? operation.kind.replace(/^guest_/, "").replaceAll("_", " ");
}

const words = new Intl.Collator();

export interface Place {
  cloud: Cloud;
  hosts: { host: Host; guests: Guest[] }[];
}

/** Clouds with their hosts with their guests, each by name. */
export function places(clouds: Iterable<Cloud>, hosts: Iterable<Host>, guests: Iterable<Guest>): Place[] {
  const byName = <T extends { name: string }>(a: T, b: T) => words.compare(a.name, b.name);
  const onHost = new Map<string, Guest[]>();
  for (const guest of guests) {
    if (!guest.host || guest.state !== "running") continue;
    const there = onHost.get(guest.host);
    if (there) there.push(guest);
    else onHost.set(guest.host, [guest]);
  }
  const living = [...hosts].filter((host) => host.state !== "removed").sort(byName);
  return [...clouds].sort(byName).map((cloud) => ({
    cloud,
    hosts: living
      .filter((host) => host.cloud === cloud.id)
      .map((host) => ({ host, guests: (onHost.get(host.id) ?? []).sort(byName) })),
  }));
}

/** A cloud with more hosts than this is shown by its sums, and by those of its hosts that want to be looked at. */
export const MOST_HOSTS = 24;
const MOST_NAMED = 12;

export interface Sums {
  hosts: number;
  up: number;
  guests: number;
  alarms: number;
  busy: number;
  /** Parts of what is there that are used, 0 to 1. */
  vcpus: number;
  memory: number;
}

/** What of a cloud is shown: all hosts, or of many its sums and the hosts that are not well or that something moves from or to. */
export function shownOf(place: Place, moving: ReadonlySet<string>): { hosts: Place["hosts"]; sums: Sums | null } {
  if (place.hosts.length <= MOST_HOSTS) return { hosts: place.hosts, sums: null };
  const sums: Sums = { hosts: place.hosts.length, up: 0, guests: 0, alarms: 0, busy: 0, vcpus: 0, memory: 0 };
  const [all, used] = [{ vcpus: 0, memory: 0 }, { vcpus: 0, memory: 0 }];
  for (const { host, guests } of place.hosts) {
    sums.up += Number(host.state === "up");
    sums.guests += guests.length;
    for (const guest of guests) {
      sums.alarms += Number(Boolean(guest.alarm));
      sums.busy += Number(!guest.alarm && Boolean(guest.operation));
    }
    all.vcpus += host.capacity.vcpus;
    all.memory += host.capacity.memory_bytes;
    used.vcpus += host.used.vcpus;
    used.memory += host.used.memory_bytes;
  }
  sums.vcpus = all.vcpus > 0 ? used.vcpus / all.vcpus : 0;
  sums.memory = all.memory > 0 ? used.memory / all.memory : 0;
  const wanted = (one: Place["hosts"][number]) => (one.host.state !== "up" || one.host.notice ? 2 : 0) + (moving.has(one.host.id) ? 1 : 0) + (one.guests.some((guest) => guest.alarm) ? 2 : 0);
  const hosts = place.hosts.filter((one) => wanted(one) > 0).sort((a, b) => wanted(b) - wanted(a)).slice(0, MOST_NAMED);
  return { hosts, sums };
}

export function may(who: WhoAmI | null | undefined, what: "move" | "change" | "administer" | "system"): boolean {
  if (!who || who.token.guest) return false;
  const rank = { viewer: 0, policy: 1, operator: 2, admin: 3 }[who.token.role];
  const least = { move: 1, change: 2, administer: 3, system: 3 }[what];
  return rank >= least && (what !== "system" || !who.token.project);
}

/** Whether somebody may cancel an operation: who may not begin a piece of work may not cancel it either. */
export function mayCancel(who: WhoAmI | null | undefined, kind: Operation["kind"]): boolean {
  if (kind === "host_rent" || kind === "host_return") return may(who, "administer");
  const moves = kind === "guest_migrate" || kind === "guest_mirror" || kind === "guest_freeze" || kind === "guest_thaw" || kind.startsWith("group_");
  return may(who, moves ? "move" : "change");
}

/** A mirror that stands has no end to come to: it is no move. */
export const isStanding = (operation: Operation): boolean => operation.kind === "guest_mirror" && !isEnded(operation.phase) && (operation.progress.mirror?.committed ?? 0) > 0;

/** Whether an event's text has all of the words, for the audit's filter. */
export function eventMatches(event: Event, words: string[]): boolean {
  const text = `${event.kind} ${event.actor} ${event.request_id} ${event.guest ?? ""} ${event.host ?? ""} ${event.operation ?? ""} ${JSON.stringify(event.data)}`;
  const low = text.toLowerCase();
  return words.every((word) => low.includes(word));
}
