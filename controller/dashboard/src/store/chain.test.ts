import { describe, expect, it } from "vitest";
import type { Event } from "../api/types";
import { blake3 } from "./blake3";
import { type Told, verify } from "./chain";

describe("BLAKE3", () => {
  // The published test vectors: bytes 0, 1, … 250, 0, 1, …
  const vectors: [number, string][] = [
    [0, "af1349b9f5f9a1a6a0404dea36dcc9499bcb25c9adc112b7cc9a93cae41f3262"],
    [1, "2d3adedff11b61f14c886e35afa036736dcd87a74d27b5c1510225d0f592e213"],
    [1023, "10108970eeda3eb932baac1428c7a2163b0e924c9a9e25b35bba72b28f70bd11"],
    [1024, "42214739f095a406f3fc83deb889744ac00df831c10daa55189b5d121c855af7"],
    [1025, "d00278ae47eb27b34faecf67b4fe263f82d5412916c1ffd97c8cb7fb814b8444"],
    [2048, "e776b6028c7cd22a4d0ba182a8bf62205d2ef576467e838ed6f2529b85fba24a"],
    [2049, "5f4d72f40d7a5f82b15ca2b2e44b1de3c2ef86c426c95c1af0b6879522563030"],
  ];
  it("is that of the published vectors", () => {
    for (const [length, hash] of vectors) expect(blake3(Uint8Array.from({ length }, (_, at) => at % 251)), String(length)).toBe(hash);
  });
});

function chain(count: number): Told[] {
  const told: Told[] = [];
  for (let seq = 1; seq <= count; seq += 1) {
    const bare = { seq, kind: "guest.switched", data: { n: 2 ** 40, text: "zwölf" }, previous_hash: told.at(-1)?.event.hash ?? "0".repeat(64), hash: "" };
    const hash = blake3(new TextEncoder().encode(JSON.stringify(bare)));
    const text = JSON.stringify({ ...bare, hash });
    told.push({ text, event: JSON.parse(text) as Event });
  }
  return told;
}

const spoilt = (one: Told, from: string, to: string): Told => {
  const text = one.text.replace(from, to);
  return { text, event: JSON.parse(text) as Event };
};

describe("the audit trail's chain", () => {
  it("holds from anywhere", () => {
    const told = chain(5);
    expect(verify(told, new WeakSet())).toEqual({ checked: 5, broken: [], gaps: 0 });
    expect(verify(told.slice(2), new WeakSet())).toEqual({ checked: 3, broken: [], gaps: 0 });
    expect(verify([told[0]!, told[3]!], new WeakSet())).toEqual({ checked: 2, broken: [], gaps: 1 });
  });
  it("names what was changed", () => {
    const told = chain(5);
    told[2] = spoilt(told[2]!, "zwölf", "elf");
    expect(verify(told, new WeakSet()).broken).toEqual([3]);
  });
  it("names what was changed and hashed anew, by the one after it", () => {
    const told = chain(5);
    const other = JSON.parse(told[2]!.text) as Event;
    const bare = JSON.stringify({ ...other, kind: "forged", hash: "" });
    const hash = blake3(new TextEncoder().encode(bare));
    const text = bare.replace('"hash":""', `"hash":"${hash}"`);
    told[2] = { text, event: JSON.parse(text) as Event };
    expect(verify(told, new WeakSet()).broken).toEqual([4]);
  });
  it("begins at nothing", () => {
    const told = chain(1);
    const first = spoilt(told[0]!, "0".repeat(64), "1".repeat(64));
    expect(verify([first], new WeakSet()).broken).toEqual([1]);
  });
});
