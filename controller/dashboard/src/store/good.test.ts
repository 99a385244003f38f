import { describe, expect, it } from "vitest";
import type { GuestVerdict, Ledger, LedgerLine, VolumeHistory, VolumePoint } from "../api/types";
import { blake3Derived } from "./blake3";
import type { Stay } from "./derive";
import { chosen, dayBegan, paidStays, priceStays, saved } from "./good";
import { pointHash, verifyPoints } from "./points";

const HOUR = 3_600_000;
const line = (kind: LedgerLine["kind"], host: string, from: number, to: number, paid: number | null): LedgerLine => ({ kind, host, from_ms: from * HOUR, to_ms: to * HOUR, paid_nanousd: paid }) as LedgerLine;
const stay = (host: string | null, from: number, until: number): Stay => ({ host, still: "", from: from * HOUR, until: until * HOUR, downtime: null, operation: null });

describe("what stays cost", () => {
  const lines = [line("runs", "a", 0, 1, 10), line("runs", "a", 1, 2, 11), line("incoming", "b", 1.9, 2, 1), line("egress", "a", 2, 2, 2), line("egress", "a", 2.5, 2.5, 3), line("runs", "b", 2, 3, 20), line("runs", "b", 3, 4, null), line("runs", "a", 6, 7, 30)];

  it("is summed over the hours of each, with what the way there cost", () => {
    const paid = paidStays(lines);
    expect(paid.map((one) => [one.host, one.from / HOUR, one.until / HOUR, one.paid, one.unpriced / HOUR])).toEqual([["a", 0, 2, 21, 0], ["b", 2, 4, 26, 1], ["a", 6, 7, 30, 0]]);
    expect(paidStays([])).toEqual([]);
    // All that was paid is in some stay.
    expect(paid.reduce((sum, one) => sum + one.paid, 0)).toBe(lines.reduce((sum, one) => sum + (one.paid_nanousd ?? 0), 0));
  });

  it("meets the events' times by the clock on the wall, and their order by a feed's", () => {
    const paid = paidStays(lines);
    const lived = [stay("a", 0, 2.01), stay("b", 2.01, 4), stay(null, 4, 6), stay("a", 6, 7)];
    const sums = (clock: Ledger["clock"], stays: Stay[]) => priceStays(stays, paid, clock).map((one) => one?.paid ?? null);
    expect(sums("wall", lived)).toEqual([21, 26, null, 30]);
    expect(sums("feed", lived.map((one) => ({ ...one, from: one.from + 1e12, until: one.until + 1e12 })))).toEqual([21, 26, null, 30]);
    // Nothing is guessed where the order does not fit.
    expect(sums("feed", [stay("c", 0, 1), stay("a", 6, 7)])).toEqual([null, 30]);
    expect(sums("feed", [stay("a", 0, 1), stay("c", 6, 7)])).toEqual([null, null]);
    expect(sums("wall", [stay("a", 100, 101)])).toEqual([null]);
  });
});

describe("figures of money", () => {
  it("say nothing of what cannot be compared", () => {
    const of = (on_demand_nanousd: number, comparable_paid_nanousd: number) => saved({ totals: { on_demand_nanousd, comparable_paid_nanousd } } as Ledger);
    expect([of(0, 0), of(50, 20), of(10, 20), saved(null)]).toEqual([null, 30, -10, null]);
  });
  it("count days by the ledger's clock", () => {
    expect(dayBegan("feed", 3 * 86_400_000 + 5)).toBe(3 * 86_400_000);
    const noon = new Date(2026, 10, 22, 12, 30).getTime();
    expect(dayBegan("wall", noon)).toBe(new Date(2026, 10, 22).getTime());
  });
});

describe("what policies chose", () => {
  const verdict = (market: string | null, runner_up: string | null, is_move = false) => ({ chosen: market, runner_up, is_move }) as GuestVerdict;
  it("is what they chose for most guests, and what comes after that", () => {
    const found = chosen([verdict("a", "b"), verdict("a", "c", true), verdict("a", "c"), verdict("b", "a"), verdict(null, null)]);
    expect([found.chosen, found.runnerUp, found.markets, found.moves.length]).toEqual(["a", "c", [["a", 3], ["b", 1]], 1]);
    expect(chosen([])).toEqual({ chosen: null, runnerUp: null, markets: [], moves: [] });
  });
});

describe("the chain of a volume's points", () => {
  it("is hashed as BLAKE3's published vectors say", () => {
    const CONTEXT = "BLAKE3 2019-12-27 16:29:52 test vectors context";
    const bytes = (length: number) => Uint8Array.from({ length }, (_, at) => at % 251);
    expect(blake3Derived(CONTEXT, bytes(0))).toBe("2cc39783c223154fea8dfb7c1b1660f2ac2dcbd1c1de8277b0b0dd39b7e50d7d");
    expect(blake3Derived(CONTEXT, bytes(1))).toBe("b3e2e340a117a499c6cf2398a19ee0d29cca2bb7404c73063382693bf66cb06c");
    expect(blake3Derived(CONTEXT, bytes(1024))).toBe("7356cd7720d5b66b6d0697eb3177d9f8d73a4a5c5e968896eb6a6896843027066c23b601d3ddfb391e90d5c8eccdef4ae2a264bce9e612ba15e2bc9d654af1481b2e75dbabe615974f1070bba84d56853265a34330b4766f8e75edd1f4a1650476c10802f22b64bd3919d246ba20a17558bc51c199efdec67e80a227251808d8ce".slice(0, 64));
    expect(blake3Derived(CONTEXT, bytes(2049))).toHaveLength(64);
  });

  const VOLUME = "vol-01a1fea9-e622-75ca-b41b-c7d245b5cc2f";
  const CLOUD = "cld-01a1fea9-e617-7305-957c-ad553aef0867";
  function history(): VolumeHistory {
    const points: VolumePoint[] = [];
    let hash = "0".repeat(64);
    for (let number = 1; number <= 5; number += 1) {
      const bare = { number, at_ms: 1000 * number, tick: 0, epoch: 2, version: 7 * number, root: "ab".repeat(32), cloud: CLOUD, stored_bytes: 5, hash: "", ...(number === 4 ? { memory: { root: "cd", bytes: 9, format: "f", is_kept: true } } : {}) } as VolumePoint;
      hash = pointHash(VOLUME, hash, bare);
      points.push({ ...bare, hash });
    }
    return { volume: VOLUME, points, thinned: [], next: 6, head: hash } as unknown as VolumeHistory;
  }

  it("hashes a point as the command does (cli/tests/points.rs)", () => {
    const bare = { number: 7, at_ms: 1_763_800_000_123, tick: 2, epoch: 3, version: 4_294_967_301, root: "ab".repeat(32), cloud: CLOUD, stored_bytes: 1_099_511_627_776, hash: "" } as VolumePoint;
    expect(pointHash(VOLUME, "cd".repeat(32), bare)).toBe("7226cfa7d46f8d85857efecc5b2d6a2f42c44c621bf35e97c1795b59e20cdfe2");
    const memory = { root: "ef".repeat(32), bytes: 67_108_864, format: "supercloud-vmm/3", is_kept: false };
    expect(pointHash(VOLUME, "cd".repeat(32), { ...bare, memory })).toBe("101e583b67b2172fb1cee1622a9fe6b541952ea24c540288a51375edf2f35008");
  });

  it("holds, also over what was thinned out, and each way to spoil it is seen", () => {
    expect(verifyPoints(history())).toEqual({ points: 5, thinned: 0, fault: "" });
    const thin = history();
    thin.thinned = [{ from: 2, to: 3, hash: thin.points[2]!.hash }];
    thin.points.splice(1, 2);
    expect(verifyPoints(thin)).toEqual({ points: 3, thinned: 2, fault: "" });
    const dropped = history();
    dropped.points[3]!.memory!.is_kept = false;
    expect(verifyPoints(dropped).fault).toBe("");
    const spoilt: [string, (one: VolumeHistory) => void][] = [
      ["point 3 is not what", (one) => { one.points[2]!.at_ms += 1; }],
      ["point 4 is not what", (one) => { one.points[3]!.memory!.root = "ce"; }],
      ["point 2 is missing", (one) => { one.points.splice(1, 1); }],
      ["point 5 is missing", (one) => { one.points.pop(); }],
      ["ends elsewhere", (one) => { one.head = "00".repeat(32); }],
      ["not later", (one) => { one.points[1]!.at_ms = 1000; }],
      ["out of its place", (one) => { one.points.splice(0, 0, one.points[0]!); }],
      ["point 2 is not what", (one) => { one.volume = CLOUD; one.points[0]!.hash = pointHash(CLOUD, "0".repeat(64), one.points[0]!); }],
    ];
    for (const [text, spoil] of spoilt) {
      const one = history();
      spoil(one);
      expect(verifyPoints(one).fault).toContain(text);
    }
  });
});
