import { describe, expect, it } from "vitest";
import type { Operation } from "../api/types";
import { NONE, further, inReach, reached } from "./done";

const operation = (at: number, phase = "done") => ({ id: `opn-${String(at).padStart(3, "0")}`, created_at_ms: at, phase }) as Operation;
const known = (...items: Operation[]) => new Map(items.map((one) => [one.id, one]));
const page = (ats: number[], next: string | null = "more") => ({ items: ats.map((at) => operation(at)), next_page: next });

describe("the newest operations", () => {
  it("are known as far back as they were asked for", () => {
    const first = reached(known(), NONE, page([9, 8, 7]));
    expect(first).toEqual({ back_to: 7, next: "more" });
    expect(further(first, page([6, 5], "older"))).toEqual({ back_to: 5, next: "older" });
    expect(further(first, page([], "older")), "a page of which all was passed over").toEqual({ back_to: 7, next: "older" });
    expect(further(first, page([6], null))).toEqual({ back_to: -Infinity, next: null });
  });
  it("reach as far as before when the new ones meet them, and no further back than the gap when not", () => {
    const before = { back_to: 3, next: "older" };
    const have = known(operation(3), operation(4), operation(5));
    expect(reached(have, before, page([7, 6, 5]))).toEqual(before);
    expect(reached(have, before, page([9, 8, 7]))).toEqual({ back_to: 7, next: "more" });
    expect(reached(known(operation(1), operation(9)), before, page([9, 8])), "one that is known meets").toEqual(before);
    expect(reached(known(operation(1)), before, page([2, 1])), "what was looked at behind the gap does not").toEqual({ back_to: 1, next: "more" });
    expect(reached(have, before, page([2, 1], null))).toEqual({ back_to: -Infinity, next: null });
  });
  it("are listed without a gap, with what is under way however old it is", () => {
    const all = [operation(1), operation(2, "copy"), operation(5), operation(6), operation(4)];
    expect(inReach(all, { back_to: 5, next: "more" }).map((one) => one.created_at_ms)).toEqual([6, 5, 2]);
    expect(inReach(all, NONE).map((one) => one.created_at_ms)).toEqual([2]);
  });
});
