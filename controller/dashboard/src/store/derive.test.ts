import { describe, expect, it } from "vitest";
import { StreamParser } from "../api/stream";
import type { Evacuation, Event, Guest, GuestVerdict, Host, Operation, Phase, WhoAmI } from "../api/types";
import { bytes, duration, eta, feedTime, money } from "../ui/format";
import { MOST_HOSTS, alarms, fraction, isStanding, may, mayCancel, rounds, shownOf, stays } from "./derive";

const progress = {
  memory_total_bytes: 100, memory_sent_bytes: 0, memory_remaining_bytes: 100, round: 1, dirty_bytes_per_s: 0, bandwidth_bytes_per_s: 0,
  mirror: null, is_holding: false, memory_missing_bytes: null, disk_bytes_before_resume: null, disk_bytes_after_resume: null, disk_missing_bytes: 0, eta_min_ms: null, eta_max_ms: null, downtime_ms: null, message: "",
};
const operation = (phase: Phase, more: Partial<Operation> = {}): Operation =>
  ({ id: "op", kind: "guest_migrate", phase, progress: { ...progress }, created_at_ms: 0, updated_at_ms: 0, ended_at_ms: 1000, is_cancel_requested: false, ...more }) as Operation;

describe("the bar", () => {
  it("never goes back while a move goes on", () => {
    let seen = 0;
    const steps: Operation[] = [operation("plan"), operation("prepare")];
    for (let round = 1; round < 6; round += 1) {
      for (const remaining of [100, 60, 10]) steps.push(operation("copy", { progress: { ...progress, round, memory_remaining_bytes: remaining } }));
    }
    for (const phase of ["switch", "resume", "finish", "done"] as Phase[]) steps.push(operation(phase));
    for (const step of steps) {
      const part = fraction(step);
      expect(part).toBeGreaterThanOrEqual(seen);
      expect(part).toBeLessThanOrEqual(1);
      seen = part;
    }
    expect(seen).toBe(1);
  });
  it("is whole when a mirror's standby could take over", () => {
    const mirror = (committed: number) => operation("copy", { kind: "guest_mirror", progress: { ...progress, mirror: { cut: 1, committed, committed_age_ms: 0, pause_ms: 0, is_leased: false, dirty_bytes: 0 } } });
    expect(fraction(mirror(0))).toBeLessThan(1);
    expect(fraction(mirror(1))).toBe(1);
  });
});

describe("alarms", () => {
  const host = { id: "h", name: "one", state: "up" } as Host;
  const guest = { id: "g", name: "web", state: "running", alarm: null } as Guest;
  const late = { guest: "g", host_name: "one", state: "late", detail: "it writes too fast" } as Evacuation;
  it("are silent when all is well and for what was cancelled by somebody", () => {
    expect(alarms([guest], [host], [operation("done"), operation("rolled_back", { is_cancel_requested: true })], [{ ...late, state: "in_time" }], [], 2000)).toEqual([]);
  });
  it("name what is wrong, worst first, and forget failures after a day", () => {
    const found = alarms([{ ...guest, alarm: "its disk stalls" }], [{ ...host, state: "unreachable" }], [operation("rolled_back"), operation("failed")], [late], [], 2000);
    expect(found.map((one) => one.level)).toEqual(["bad", "bad", "bad", "bad", "warn"]);
    expect(found.find((one) => one.text.includes("in time"))).toMatchObject({ what: "web", text: "could not leave one in time: it writes too fast" });
    expect(alarms([guest], [host], [operation("failed")], [], [], 90_000_000)).toEqual([]);
  });
  it("tell of hosts that are taken back, and of hints less loudly", () => {
    const noticed = (kind: "interruption" | "rebalance", state: Host["state"] = "up") => alarms([guest], [{ ...host, state, notice: { kind, at_ms: null, heard_at_ms: 1 } }], [], [], [], 2000);
    expect(noticed("interruption")).toMatchObject([{ level: "bad", what: "one", text: "its provider takes it back soon" }]);
    expect(noticed("rebalance")).toMatchObject([{ level: "warn", what: "one" }]);
    expect(noticed("interruption", "removed")).toEqual([]);
  });
});

describe("what is wanted elsewhere", () => {
  const [guest, verdict] = [{ id: "g", name: "web", state: "running", alarm: null } as Guest, { guest: "g", guest_name: "web", is_move: true, chosen: "west/big/spot", reason: "it is cheaper" } as GuestVerdict];
  it("is told, until it is on its way", () => {
    expect(alarms([guest], [], [], [], [verdict], 0)).toMatchObject([{ level: "warn", what: "web", text: "is not where its policy wants it, which is west/big/spot: it is cheaper" }]);
    expect(alarms([{ ...guest, operation: "opn-1" }], [], [], [], [verdict], 0)).toEqual([]);
    expect(alarms([guest], [], [], [], [{ ...verdict, is_move: false }], 0)).toEqual([]);
    expect(alarms([], [], [], [], [verdict], 0), "of a guest that is gone").toEqual([]);
  });
});

describe("cancelling", () => {
  const somebody = (role: string) => ({ token: { role, project: null, guest: null } }) as unknown as WhoAmI;
  it("is for whoever may begin the like", () => {
    const may = (role: string) => (["guest_migrate", "guest_thaw", "guest_start", "image_import", "host_rent"] as const).filter((kind) => mayCancel(somebody(role), kind));
    expect(may("viewer")).toEqual([]);
    expect(may("policy")).toEqual(["guest_migrate", "guest_thaw"]);
    expect(may("operator")).toEqual(["guest_migrate", "guest_thaw", "guest_start", "image_import"]);
    expect(may("admin")).toEqual(["guest_migrate", "guest_thaw", "guest_start", "image_import", "host_rent"]);
  });
  it("does not take a mirror that stands for a move", () => {
    const mirror = (committed: number, phase: Phase = "copy") => operation(phase, { kind: "guest_mirror", progress: { ...progress, mirror: { cut: 1, committed, committed_age_ms: 0, pause_ms: 0, is_leased: false, dirty_bytes: 0 } } });
    expect([mirror(0), mirror(1), mirror(1, "failed"), operation("copy")].map(isStanding)).toEqual([false, true, false, false]);
  });
});

describe("the places of a guest", () => {
  it("are what the controller told of it", () => {
    const told = [{ from_ms: 1, until_ms: 2, host: "a", is_lost: false, operation: "o", downtime_ms: 42 }, { from_ms: 2, until_ms: 3, is_lost: true }] as never;
    expect(stays(told)).toEqual([{ host: "a", still: "", from: 1, until: 2, downtime: 42, operation: "o" }, { host: null, still: "lost", from: 2, until: 3, downtime: null, operation: null }]);
  });
});

describe("a cloud on the map", () => {
  const host = (id: number, more: object = {}) => ({ host: { id: `h${id}`, name: `h${id}`, state: "up", capacity: { vcpus: 4, memory_bytes: 100 }, used: { vcpus: 1, memory_bytes: 50 }, ...more }, guests: [{ id: `g${id}` }] });
  const place = (hosts: unknown[]) => ({ cloud: { id: "c" }, hosts }) as never;
  it("shows few hosts as they are, and many by their sums and those to look at", () => {
    const few = Array.from({ length: MOST_HOSTS }, (_, at) => host(at));
    expect(shownOf(place(few), new Set())).toEqual({ hosts: few, sums: null });
    const many = [...Array.from({ length: 500 }, (_, at) => host(at)), host(500, { state: "unreachable" })];
    const found = shownOf(place(many), new Set(["h7"]));
    expect(found.hosts.map((one) => one.host.id)).toEqual(["h500", "h7"]);
    expect(found.sums).toEqual({ hosts: 501, up: 500, guests: 501, alarms: 0, busy: 0, vcpus: 0.25, memory: 0.5 });
    const bad = Array.from({ length: 100 }, (_, at) => host(at, { state: "unreachable" }));
    expect(shownOf(place(bad), new Set()).hosts).toHaveLength(12);
  });
});

describe("rounds", () => {
  const sample = (at: number, round: number, sent: number, remaining: number, dirty = 0) => ({ at, round, sent, remaining, dirty, bandwidth: 0 });
  it("are told apart, each with what it sent and left", () => {
    const found = rounds([sample(0, 0, 0, 100), sample(10, 1, 40, 60), sample(20, 1, 80, 20, 5), sample(30, 2, 90, 10, 3), sample(40, 3, 95, 0)]);
    expect(found.map((one) => [one.round, one.sent, one.remaining, one.took, one.dirty])).toEqual([[1, 80, 20, 20, 5], [2, 10, 10, 10, 3], [3, 5, 0, 0, 0]]);
  });
});

describe("roles", () => {
  const token = (role: string, project: string | null = null, guest: string | null = null) => ({ token: { role, project, guest } }) as never;
  it("see buttons for what they may do", () => {
    expect(may(token("viewer"), "move")).toBe(false);
    expect(may(token("policy"), "move")).toBe(true);
    expect(may(token("policy"), "change")).toBe(false);
    expect(may(token("admin", "p"), "system")).toBe(false);
    expect(may(token("admin"), "system")).toBe(true);
    expect(may(token("operator", "p", "g"), "move")).toBe(false);
    expect(may(null, "move")).toBe(false);
  });
});

describe("the stream", () => {
  it("is the same however it is cut", () => {
    const told = [1, 2, 3].map((seq) => ({ seq, kind: "guest.switched", data: { text: "zwölf\\n" } }) as unknown as Event);
    const text = ": open\n\n" + told.map((event) => `id: ${event.seq}\nevent: ${event.kind}\ndata: ${JSON.stringify(event)}\n\n`).join(": alive\n\n");
    for (let size = 1; size < text.length; size += 7) {
      const parser = new StreamParser();
      const seen: Event[] = [];
      for (let at = 0; at < text.length; at += size) seen.push(...parser.push(text.slice(at, at + size)));
      expect(seen).toEqual(told);
    }
  });
});

describe("numbers for people", () => {
  it("are short and true", () => {
    expect([bytes(0), bytes(1536), bytes(5 * 1024 ** 3), bytes(117.4 * 1024 ** 2)]).toEqual(["0 B", "1.5 KiB", "5.0 GiB", "117 MiB"]);
    expect([duration(680), duration(7234), duration(61_000), duration(7_200_000)]).toEqual(["680 ms", "7.2 s", "1 min 1 s", "2 h 0 min"]);
    expect([eta(null, null), eta(2000, null), eta(2000, 4000)]).toEqual(["", "at least 2.0 s", "2.0 s – 4.0 s"]);
    expect([money(0), money(1_234_000), money(12_345_000_000), money(123_456_000_000_000)]).toEqual(["$0.00", "$0.0012", "$12.35", "$123456"]);
    expect(feedTime(46_020_960)).toBe("day 1, 12:47");
  });
});
