import { describe, expect, it } from "vitest";
import type { FleetPlan, Guest, Host, PlanState, PlanStep } from "../api/types";
import { loads, offers, tally, title } from "./plans";

const GIB = 2 ** 30;
const step = (guest: string, from: string, to: string, state: PlanStep["state"] = "pending") => ({ guest, from, to, state, predicted_bytes: GIB }) as PlanStep;
const plan = (state: PlanState, more: Partial<FleetPlan> = {}) => ({ kind: "drain", host: "a", cloud: null, state, steps: [], cordons: [], stuck: [], ...more }) as unknown as FleetPlan;
const host = (id: string, used: number) => [id, { id, name: id, cloud_name: "home", capacity: { memory_bytes: 8 * GIB }, used: { memory_bytes: used * GIB } } as Host] as const;

describe("a plan", () => {
  it("offers what the controller would take", () => {
    expect(offers(plan("proposed"))).toEqual(["cancel"]);
    expect(offers(plan("proposed", { steps: [step("g", "a", "b")] }))).toEqual(["apply", "cancel"]);
    expect(offers(plan("running"))).toEqual(["cancel"]);
    expect(offers(plan("undoing"))).toEqual(["cancel"]);
    expect(offers(plan("cancelling"))).toEqual([]);
    expect(offers(plan("cancelled", { steps: [step("g", "a", "b", "cancelled")] }))).toEqual([]);
    expect(offers(plan("failed", { steps: [step("g", "a", "b", "done")] }))).toEqual(["undo"]);
    expect(offers(plan("done", { cordons: [{ host: "a", host_name: "a" as never, state: "cordoned" }] }))).toEqual(["undo"]);
    expect(offers(plan("undone"))).toEqual([]);
  });
  it("tells how full hosts will be by the steps that are still ahead", () => {
    const guests = new Map([["g", { id: "g", host: "a", state: "running", shape: { memory_bytes: 2 * GIB } } as Guest]]);
    const hosts = new Map([host("a", 4), host("b", 1), host("c", 7)]);
    const found = loads(plan("running", { steps: [step("g", "a", "b"), step("unseen", "a", "c", "running"), step("past", "a", "c", "done")] }), hosts, guests);
    expect(found.map((one) => [one.name, one.memoryNow * 8, one.memoryThen * 8, one.guestsNow, one.guestsThen])).toEqual([["a", 4, 1, 1, 0], ["b", 1, 3, 0, 1], ["c", 7, 8, 0, 1]]);
    expect(loads(plan("proposed", { cordons: [{ host: "a", host_name: "a" as never, state: "pending" }] }), hosts, guests)).toEqual([]);
    expect(loads(plan("done", { steps: [step("g", "a", "b", "done")] }), hosts, guests)).toEqual([]);
  });
  it("has a name and a tally", () => {
    expect(title(plan("done"), new Map([["a", { name: "h1" }]]), new Map())).toBe("Drain h1");
    expect(tally([step("1", "a", "b"), step("2", "a", "b", "done"), step("3", "a", "b")])).toEqual([["pending", 2], ["done", 1]]);
  });
});
