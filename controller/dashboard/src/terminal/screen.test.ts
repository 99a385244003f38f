import { describe, expect, it } from "vitest";
import { parting, unseen } from "../api/console";
import { pasted, typed } from "./keys";
import { Screen } from "./screen";

const bytes = (text: string) => new TextEncoder().encode(text);
const shown = (text: string, columns = 20, rows = 5): Screen => {
  const screen = new Screen(columns, rows, 50);
  screen.write(bytes(text));
  return screen;
};
const lines = (screen: Screen): string[] => screen.lines.map((row) => row.cells.map((cell) => cell.sign).join("").trimEnd());

describe("the screen", () => {
  it("writes text, and wraps only when the next sign comes", () => {
    const screen = shown("12345678901234567890");
    expect([screen.x, screen.y]).toEqual([20, 0]);
    screen.write(bytes("\r\nx"));
    expect(lines(screen).slice(0, 3)).toEqual(["12345678901234567890", "x", ""]);
    expect(lines(shown("12345678901234567890ab")).slice(0, 2)).toEqual(["12345678901234567890", "ab"]);
    expect(lines(shown("\x1b[?7l12345678901234567890ab"))[0]).toBe("1234567890123456789b");
  });
  it("does what a shell asks when a line is edited", () => {
    // "echo hallo", back five, an e for the a, and to the end.
    expect(lines(shown("$ echo hallo\b\b\b\be\x1b[3C!"))[0]).toBe("$ echo hello!");
    // Room for a sign in the middle, one taken out, the rest erased.
    expect(lines(shown("abdef\x1b[3D\x1b[1@c"))[0]).toBe("abcdef");
    expect(lines(shown("abXcd\x1b[3D\x1b[1P"))[0]).toBe("abcd");
    expect(lines(shown("abcdef\x1b[3G\x1b[K"))[0]).toBe("ab");
    expect(lines(shown("one\r\ntwo\x1b[H\x1b[J>"))).toEqual([">", "", "", "", ""]);
    expect(lines(shown("a\tb"))[0]).toBe("a       b");
  });
  it("keeps what scrolls off its top, and no more than it may", () => {
    const screen = shown(Array.from({ length: 100 }, (_, at) => `line ${at}`).join("\r\n"));
    expect(lines(screen)).toEqual(["line 95", "line 96", "line 97", "line 98", "line 99"]);
    expect(screen.past).toHaveLength(50);
    expect(screen.text().split("\n")[0]).toBe("line 45");
    screen.write(bytes("\x1b[3J"));
    expect(screen.past).toHaveLength(0);
  });
  it("scrolls a region, as editors want it, and gives the shell its screen back", () => {
    const screen = shown("1\r\n2\r\n3\r\n4\r\n5\x1b[2;4r\x1b[4;1H\nx");
    expect(lines(screen)).toEqual(["1", "3", "4", "x", "5"]);
    expect(lines(shown("1\r\n2\r\n3\x1b[2;1H\x1b[L"))).toEqual(["1", "", "2", "3", ""]);
    expect(lines(shown("1\r\n2\r\n3\x1b[1;1H\x1b[M"))).toEqual(["2", "3", "", "", ""]);
    const other = shown("$ vi\x1b[?1049h\x1b[2J\x1b[HFILE\r\n\n\n\n\n\n\n");
    expect(other.past).toHaveLength(0);
    other.write(bytes("\x1b[?1049l!"));
    expect(lines(other)[0]).toBe("$ vi!");
  });
  it("shows colours, and signs that come in two pieces", () => {
    const screen = shown("\x1b[1;32mok\x1b[0m \x1b[44;97mx\x1b[m");
    const looks = screen.lines[0]!.cells.map((cell) => cell.look);
    expect(looks[0]).toMatchObject({ fore: 2, bold: true });
    expect(looks[2]).toMatchObject({ fore: -1, bold: false });
    expect(looks[3]).toMatchObject({ fore: 15, back: 4 });
    // A colour by red, green and blue is passed over with its numbers: 5 and 7 in it are no looks.
    expect(shown("\x1b[38;2;5;7;9mx").lines[0]!.cells[0]!.look).toMatchObject({ fore: -1, inverse: false });
    const cut = new Screen(20, 5);
    const euro = bytes("€");
    cut.write(euro.subarray(0, 1));
    cut.write(euro.subarray(1));
    expect(lines(cut)[0]).toBe("€");
    expect(lines(shown("\x1b(0lqk\x1b(B|"))[0]).toBe("┌─┐|");
  });
  it("passes over what is for other terminals", () => {
    expect(lines(shown("\x1b]0;a title\x07a\x1b]8;;x\x1b\\b\x1bPq...\x1b\\c\x1b[>4;1md\x1b[6ne"))[0]).toBe("abcde");
    expect(lines(shown("\x1b[12\x18a"))[0]).toBe("a");
  });
  it("lives through whatever is said, and stays as large as it was", () => {
    const screen = new Screen(20, 5, 50);
    // A generator of its own: the same each time.
    let state = 12;
    const next = (below: number) => {
      state = (Math.imul(state, 1_103_515_245) + 12_345) >>> 0;
      return (state >>> 8) % below;
    };
    const parts = ["\x1b[", "\x1b]", "\x1b", ";", "?", "99999999", "0", "3", "A", "B", "C", "D", "H", "J", "K", "L", "M", "P", "S", "T", "X", "@", "b", "h", "l", "r", "m", "u", "s", "1049", "\n", "\r", "\b", "\t", "x", "\x07", "#", "(", "7", "8", "c"];
    for (let round = 0; round < 20_000; round += 1) {
      screen.write(bytes(parts[next(parts.length)]!));
      if (round % 7 === 0) screen.write(Uint8Array.of(next(256)));
      expect(screen.y).toBeGreaterThanOrEqual(0);
      expect(screen.y).toBeLessThan(5);
      expect(screen.x).toBeGreaterThanOrEqual(0);
      expect(screen.x).toBeLessThanOrEqual(20);
    }
    expect(screen.lines).toHaveLength(5);
    expect(screen.past.length).toBeLessThanOrEqual(50);
    for (const row of [...screen.lines, ...screen.past]) {
      expect(row.cells).toHaveLength(20);
      for (let at = 0; at < 20; at += 1) expect(row.cells[at]!.sign.length).toBeGreaterThan(0);
    }
  });
});

describe("keys", () => {
  const key = (name: string, more: object = {}) => typed({ key: name, ctrlKey: false, altKey: false, metaKey: false, shiftKey: false, ...more }, false);
  it("say what a console expects, and leave signs and the browser's own to the browser", () => {
    expect(key("Enter")).toBe("\r");
    expect(key("Backspace")).toBe("\x7f");
    expect(key("c", { ctrlKey: true })).toBe("\x03");
    expect(key("ArrowUp")).toBe("\x1b[A");
    expect(typed({ key: "ArrowUp", ctrlKey: false, altKey: false, metaKey: false, shiftKey: false }, true)).toBe("\x1bOA");
    expect(key("b", { altKey: true })).toBe("\x1bb");
    expect(key("a")).toBeUndefined();
    expect(key("v", { ctrlKey: true })).toBeUndefined();
    expect(key("C", { ctrlKey: true, shiftKey: true })).toBeUndefined();
    expect(key("r", { metaKey: true })).toBeUndefined();
  });
  it("paste lines as Enter ends them, and cannot break out of the marks", () => {
    expect(pasted("a\r\nb\n", false)).toBe("a\rb\r");
    expect(pasted("a\x1b[201~rm", true)).toBe("\x1b[200~a[201~rm\x1b[201~");
  });
});

describe("a console that is followed", () => {
  it("shows of the next host's past what was not seen", () => {
    const known = bytes("the last that was said\r\n");
    expect(unseen(bytes("before, the last that was said\r\nand more"), known)).toEqual(bytes("and more"));
    expect(unseen(bytes("the last that was said\r\nthe last that was said\r\n$"), known)).toEqual(bytes("$"));
    expect(unseen(bytes("another past"), known)).toBeUndefined();
    expect(unseen(bytes(""), known)).toBeUndefined();
  });
  it("knows why it ended", () => {
    expect(parting(bytes("$ \r\n[another console of the guest was opened]\r\n"))).toBe("another console of the guest was opened");
    expect(parting(bytes("[ ok ] started\r\n"))).toBeUndefined();
  });
});
