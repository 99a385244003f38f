import { describe, expect, it } from "vitest";
import type { Evacuation, Host, HostLink, LedgerLine, Market, Port, Renting, VolumePoint } from "../api/types";
import { hostRisk, marketRisk, priced, tenures } from "./risk";
import { MOST_HOSTS, topology } from "./topology";
import { refused } from "../ui/answer";
import { bands, bandsText, marks, pointAsOf, seconds } from "./travel";
import { between, linkText, lossText, roundTrip, wayText, ways } from "./ways";

const link = (from: string, to: string, more: Partial<HostLink> = {}): HostLink => ({
  from, from_name: from, from_cloud: from[0]!, from_cloud_name: `cloud ${from[0]}`, to, to_name: to, to_cloud: to[0]!, to_cloud_name: `cloud ${to[0]}`,
  state: "answers", why: null, rtt_us: 1000, rtt_least_us: 900, loss: 0, probes: 24, answered: 24, sent: 24, resent: 0, answered_at_ms: 1, told_at_ms: 1, ...more,
}) as HostLink;

describe("ways between clouds", () => {
  it("are the median of those that answer, with the loss of all of them", () => {
    const found = ways([link("a1", "b1", { rtt_us: 5000 }), link("b1", "a1", { rtt_us: 9000, sent: 26, resent: 2 }), link("a2", "b1", { rtt_us: 7000 }), link("a1", "a2", { rtt_us: 80 })]);
    expect(found).toHaveLength(2);
    expect(found[0]).toMatchObject({ fromName: "cloud a", toName: "cloud b", state: "answers", rttUs: 7000, links: 3 });
    expect(found[0]!.loss).toBeCloseTo(2 / 74);
    expect(wayText(found[0]!)).toBe("7.0 ms, 2.7 % lost");
    expect(wayText(found[1]!)).toBe("80 µs, 0.0 % lost");
  });
  it("say what is silent and what nobody has measured, and make up nothing", () => {
    const silent = link("a1", "b1", { state: "silent", rtt_us: null, loss: null, sent: 0 });
    const none = link("b1", "a1", { state: "not_measured", rtt_us: null, loss: null, sent: 0, probes: 0 });
    expect(wayText(ways([silent])[0]!)).toBe("no answer");
    expect(wayText(ways([none])[0]!)).toBe("not measured");
    expect(ways([none])[0]).toMatchObject({ rttUs: null, loss: null });
    expect(wayText(ways([silent, link("a2", "b1")])[0]!)).toBe("1.0 ms, 0.0 % lost, 1 of 2 silent");
    expect(ways([link("a1", "b1", { sent: 5, resent: 1 })])[0]!.loss).toBeNull();
    expect(lossText(null)).toBe("–");
    expect(lossText(0.0004)).toBe("< 0.1 % lost");
    expect(roundTrip(123_456)).toBe("123 ms");
  });
  it("between two hosts are by the direction of which more is known", () => {
    const found = between([link("b1", "a1", { state: "not_measured" }), link("a1", "b1"), link("a2", "b1")], "b1", "a1");
    expect(found).toMatchObject({ from: "a1", to: "b1" });
    expect(linkText(between([], "a", "b"))).toBe("not measured");
  });
});

describe("what an endpoint told", () => {
  const known = { path: "/v1/x", value: 7, problem: "", isNone: false };
  const problem = (status: number, code: string) => ({ status, code, detail: "no" });
  it("is kept over a refusal that passes, and ends when there is no such thing", () => {
    expect(refused(known, "/v1/x", problem(429, "too_many_requests"))).toEqual({ ...known, problem: "no" });
    expect(refused(known, "/v1/x", problem(503, "store_unavailable")).value).toBe(7);
    expect(refused(known, "/v1/x", problem(404, "not_found"))).toEqual({ path: "/v1/x", problem: "no", isNone: true });
    expect(refused(known, "/v1/x", problem(409, "wrong_state")).value).toBeUndefined();
    expect(refused(known, "/v1/y", problem(429, "too_many_requests")).value).toBeUndefined();
  });
});

const point = (number: number, at_ms: number): VolumePoint => ({ number, at_ms, tick: 0, epoch: 1, version: number, root: "r", cloud: "c", stored_bytes: 10, hash: "h" }) as VolumePoint;

describe("time travel", () => {
  const points = [point(1, 100), point(2, 200), point(4, 200), point(5, 900)];
  it("finds the newest point that is not younger", () => {
    expect([99, 100, 199, 200, 899, 900, 5000].map((at) => pointAsOf(points, at)?.number)).toEqual([undefined, 1, 1, 4, 4, 5, 5]);
    expect(marks(points, 100, 900)).toEqual([0, 0.125, 0.125, 1]);
    expect(marks([point(1, 5)], 5, 5)).toEqual([0]);
  });
  it("reads bands as the command line does, and nothing else", () => {
    expect(bands("4h:15m 2d:1h")).toEqual([{ for_s: 14_400, every_s: 900 }, { for_s: 172_800, every_s: 3600 }]);
    expect(bandsText(bands("90:60s, 30d:1d")!)).toBe("90s:1m 30d:1d");
    for (const bad of ["", "4h", "4h:15m:3", "x:1", "4h:-1", "1:1 ".repeat(9)]) expect(bands(bad)).toBeNull();
    expect(seconds("15m")).toBe(900);
    expect(seconds("1.5h")).toBeNull();
  });
});

describe("price and risk", () => {
  const host = { id: "h", state: "up", notice: null } as Host;
  const spot = { id: "r", host: "h", cloud: "c", instance_type: "m", tenure: "spot", state: "up" } as Renting;
  const market = { name: "c/m/spot", cloud: "c", instance_type: "m", tenure: "spot", price_nanousd_per_hour: 5 } as Market;
  const one = (state: Evacuation["state"]) => ({ host: "h", state }) as Evacuation;
  it("of a host are those of how it is rented", () => {
    const ended = { ...spot, id: "old", tenure: "on_demand", state: "ended" } as Renting;
    expect(priced(host, [spot, ended], [{ ...market, tenure: "on_demand" }, market])).toEqual({ market, renting: spot });
    expect(priced({ ...host, id: "own" }, [spot], [market])).toEqual({ market: undefined, renting: undefined });
    expect(hostRisk(host, undefined, [])).toEqual({ tone: "", text: "–" });
    expect(hostRisk(host, spot, [one("late"), one("in_time")])).toEqual({ tone: "bad", text: "1 of 2 too late" });
    expect(hostRisk(host, spot, [one("unknown")]).text).toBe("1 of 1 not measured");
    expect(hostRisk(host, spot, [one("in_time")]).tone).toBe("good");
    expect(hostRisk({ ...host, notice: { kind: "interruption", heard_at_ms: 1 } } as Host, spot, []).text).toBe("is taken back");
  });
  it("of a market are what befell our own machines, and are not known without", () => {
    expect(marketRisk(market).text).toBe("not measured");
    expect(marketRisk({ ...market, tenure: "on_demand" }).text).toBe("–");
    expect(marketRisk({ ...market, seen: { machines: 3, ran_ms: 36_000_000, taken: 1, announced: 1 } })).toEqual({ tone: "bad", text: "1 taken in 10 h, 1 announced" });
    expect(marketRisk({ ...market, seen: { machines: 1, ran_ms: 60_000, taken: 0, announced: 0 } })).toEqual({ tone: "good", text: "0 taken in 1 min" });
  });
});

describe("the drawing of a network", () => {
  const hosts = new Map(Array.from({ length: 20 }, (_, at) => [`h${at}`, { id: `h${at}`, name: `h${at}`, cloud_name: at % 2 ? "east" : "west", state: "up" } as Host]));
  const port = (id: string, host: string | null, more: Partial<Port> = {}): Port => ({ id, host, prepared_at: null, guest: id, ...more }) as Port;
  it("has a tunnel between any two hosts with a port, also to one that is being prepared", () => {
    const found = topology([port("p1", "h1"), port("p2", "h1"), port("p3", "h2", { prepared_at: "h4" }), port("p4", null)], hosts);
    expect(found.nodes.map((node) => [node.name, node.ports.length])).toEqual([["h1", 2], ["h2", 1], ["h4", 0]]);
    expect(found.tunnels).toHaveLength(3);
    expect(found.away.map((one) => one.id)).toEqual(["p4"]);
  });
  it("is bounded, and within its frame", () => {
    const found = topology([...hosts.keys()].map((host) => port(`p${host}`, host)), hosts);
    expect([found.nodes.length, found.leftOut]).toEqual([MOST_HOSTS, 8]);
    expect(found.nodes.every((node) => node.x >= 105 && node.x <= 655 && node.y >= 32 && node.y <= 368)).toBe(true);
    expect(topology([], hosts)).toMatchObject({ nodes: [], tunnels: [] });
  });
});

describe("how a host is paid for", () => {
  it("is as it is rented, else as the ledger counts it, else not known", () => {
    const hosts = ["a", "b", "c", "d"].map((id) => ({ id, state: id === "d" ? "removed" : "up" }) as Host);
    const line = (host: string, market: string | null) => ({ host, market }) as LedgerLine;
    const renting = (host: string, state: string) => ({ host, state, tenure: "on_demand" }) as Renting;
    const lines = [line("a", "home/big/spot"), line("b", "home/big/spot"), line("c", null), line("d", "home/big/spot")];
    expect([...tenures(hosts, [renting("b", "up"), renting("a", "ended")], lines)]).toEqual([["a", "spot"], ["b", "on_demand"]]);
    expect([...tenures(hosts, [], [line("a", "home/big/spot"), line("a", "home/big/on_demand")])]).toEqual([["a", "on_demand"]]);
  });
});
