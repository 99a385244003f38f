// A screen as a Linux console expects it: what VT100 and ECMA-48 say about text, the cursor, erasing, scrolling and colours, for as
// much as shells, boot messages and editors use. Pure: bytes in, rows out. Whatever a guest says, it takes bounded memory and time.
//
// It answers no questions (where the cursor is, what it is): the past of a console is shown first, and what was asked in it would be
// answered anew, into the shell of whoever looks now.

/** A sign's look: colours 0 to 7 and 8 to 15 for the bright ones, -1 for the page's own. */
export interface Look { fore: number; back: number; bold: boolean; faint: boolean; underlined: boolean; inverse: boolean }

export interface Cell { sign: string; look: Look }

/** A row of the screen; `version` changes with what is in it. */
export interface Row { id: number; version: number; cells: Cell[] }

const PLAIN: Look = { fore: -1, back: -1, bold: false, faint: false, underlined: false, inverse: false };
const MOST_PARAMETERS = 16;
const MOST_VALUE = 9999;
/** Of a title or the like that is passed over; what is longer is text again. */
const MOST_PASSED_OVER = 4096;

/** DEC's line drawing set, 0x60 to 0x7e. */
const LINES = "◆▒␉␌␍␊°±␤␋┘┐┌└┼⎺⎻─⎼⎽├┤┴┬│≤≥π≠£·";

type Stage = "text" | "escape" | "control" | "charset" | "passed" | "passed_escape" | "hash";

interface Saved { x: number; y: number; look: Look; isDrawing: boolean }

export class Screen {
  /** The cursor, from 0; `x` may be `columns` after the last column was written: the next sign begins a row. */
  x = 0;
  y = 0;
  isCursorShown = true;
  /** Arrow keys are sent as applications want them. */
  hasApplicationKeys = false;
  /** What the guest pastes between marks. */
  hasBracketedPaste = false;
  /** Rows that left the screen at its top, oldest first. */
  readonly past: Row[] = [];
  private shown: Row[];
  private kept: Row[] | undefined;
  private look: Look = PLAIN;
  private top = 0;
  private bottom: number;
  private wraps = true;
  private inserts = false;
  private isDrawing = false;
  private saved: Saved = { x: 0, y: 0, look: PLAIN, isDrawing: false };
  private stage: Stage = "text";
  private parameters: number[] = [];
  private mark = "";
  private passed = 0;
  private intoG0 = true;
  private last = "";
  private nextId = 0;
  private readonly decoder = new TextDecoder();

  constructor(readonly columns = 80, readonly rows = 24, private readonly mostPast = 1000) {
    this.bottom = rows - 1;
    this.shown = Array.from({ length: rows }, () => this.blank());
  }

  get lines(): readonly Row[] {
    return this.shown;
  }

  /** Takes what the guest said; a sign may be cut in two by the pieces. */
  write(bytes: Uint8Array): void {
    for (const sign of this.decoder.decode(bytes, { stream: true })) this.take(sign);
  }

  /** All rows as text, without the blanks at their ends. */
  text(): string {
    return [...this.past, ...this.shown].map((row) => row.cells.map((cell) => cell.sign).join("").trimEnd()).join("\n").trimEnd();
  }

  private blank(): Row {
    this.nextId += 1;
    const cell = this.gap();
    return { id: this.nextId, version: 0, cells: Array.from({ length: this.columns }, () => cell) };
  }

  private row(): Row {
    const row = this.shown[this.y]!;
    row.version += 1;
    return row;
  }

  private take(sign: string): void {
    const code = sign.codePointAt(0)!;
    if (this.stage === "passed" || this.stage === "passed_escape") return this.pass(sign, code);
    if (code < 0x20 || code === 0x7f) return this.control(code);
    switch (this.stage) {
      case "text": return this.put(this.isDrawing && code >= 0x60 && code <= 0x7e ? [...LINES][code - 0x60]! : sign);
      case "escape": return this.escape(sign);
      case "charset":
        if (this.intoG0) this.isDrawing = sign === "0";
        this.stage = "text";
        return;
      case "hash":
        this.stage = "text";
        return;
      case "control": return this.sequence(sign, code);
    }
  }

  /** Titles and other texts for a terminal: until BEL or ESC \. */
  private pass(sign: string, code: number): void {
    this.passed += 1;
    if (code === 0x07 || code === 0x18 || code === 0x1a || this.passed > MOST_PASSED_OVER || (this.stage === "passed_escape" && sign === "\\")) this.stage = "text";
    else this.stage = code === 0x1b ? "passed_escape" : "passed";
  }

  private control(code: number): void {
    switch (code) {
      case 0x08: this.x = Math.max(0, Math.min(this.x, this.columns - 1) - 1); return;
      case 0x09: this.x = Math.min(this.columns - 1, (Math.floor(this.x / 8) + 1) * 8); return;
      case 0x0a: case 0x0b: case 0x0c: this.down(); return;
      case 0x0d: this.x = 0; return;
      case 0x18: case 0x1a: this.stage = "text"; return;
      case 0x1b: this.stage = "escape"; return;
    }
  }

  private put(sign: string): void {
    if (this.x >= this.columns) {
      if (this.wraps) {
        this.x = 0;
        this.down();
      } else this.x = this.columns - 1;
    }
    const { cells } = this.row();
    if (this.inserts) {
      cells.splice(this.x, 0, { sign, look: this.look });
      cells.length = this.columns;
    } else cells[this.x] = { sign, look: this.look };
    this.x += 1;
    this.last = sign;
  }

  private down(): void {
    if (this.y === this.bottom) this.scrollUp(1);
    else if (this.y < this.rows - 1) this.y += 1;
  }

  private up(): void {
    if (this.y === this.top) this.scrollDown(1);
    else if (this.y > 0) this.y -= 1;
  }

  private scrollUp(count: number): void {
    for (let left = Math.min(count, this.bottom - this.top + 1); left > 0; left -= 1) {
      const [gone] = this.shown.splice(this.top, 1);
      // What an editor or a region scrolls away is not the past.
      if (this.top === 0 && !this.kept) this.past.push(gone!);
      this.shown.splice(this.bottom, 0, this.blank());
    }
    if (this.past.length > this.mostPast) this.past.splice(0, this.past.length - this.mostPast);
  }

  private scrollDown(count: number): void {
    for (let left = Math.min(count, this.bottom - this.top + 1); left > 0; left -= 1) {
      this.shown.splice(this.bottom, 1);
      this.shown.splice(this.top, 0, this.blank());
    }
  }

  private escape(sign: string): void {
    this.stage = "text";
    switch (sign) {
      case "[": this.stage = "control"; this.parameters = []; this.mark = ""; return;
      case "]": case "P": case "X": case "^": case "_": this.stage = "passed"; this.passed = 0; return;
      case "(": case ")": case "*": case "+": this.stage = "charset"; this.intoG0 = sign === "("; return;
      case "#": case "%": this.stage = "hash"; return;
      case "7": this.save(); return;
      case "8": this.restore(); return;
      case "D": this.down(); return;
      case "E": this.x = 0; this.down(); return;
      case "M": this.up(); return;
      case "c": this.reset(); return;
    }
  }

  private save(): void {
    this.saved = { x: this.x, y: this.y, look: this.look, isDrawing: this.isDrawing };
  }

  private restore(): void {
    ({ x: this.x, y: this.y, look: this.look, isDrawing: this.isDrawing } = this.saved);
  }

  private reset(): void {
    this.leaveOther();
    this.look = PLAIN;
    this.past.push(...this.shown.filter((row) => row.cells.some((cell) => cell.sign !== " ")));
    if (this.past.length > this.mostPast) this.past.splice(0, this.past.length - this.mostPast);
    this.shown = Array.from({ length: this.rows }, () => this.blank());
    [this.x, this.y, this.top, this.bottom] = [0, 0, 0, this.rows - 1];
    [this.wraps, this.inserts, this.isDrawing, this.isCursorShown, this.hasApplicationKeys, this.hasBracketedPaste] = [true, false, false, true, false, false];
    this.save();
  }

  private sequence(sign: string, code: number): void {
    if (code >= 0x30 && code <= 0x39) {
      if (this.parameters.length === 0) this.parameters.push(0);
      const at = this.parameters.length - 1;
      this.parameters[at] = Math.min(MOST_VALUE, this.parameters[at]! * 10 + code - 0x30);
    } else if (sign === ";" || sign === ":") {
      if (this.parameters.length === 0) this.parameters.push(0);
      // What has more is nothing that a console says: the rest counts as one.
      if (this.parameters.length < MOST_PARAMETERS) this.parameters.push(0);
    } else if (code < 0x40) {
      this.mark = (this.mark + sign).slice(0, 4);
    } else {
      this.stage = "text";
      if (this.mark === "") this.act(sign);
      else if (this.mark === "?" && (sign === "h" || sign === "l")) for (const mode of this.parameters) this.privateMode(mode, sign === "h");
      else if (this.mark === "!" && sign === "p") this.reset();
    }
  }

  private value(at: number, least: number): number {
    return Math.max(least, this.parameters[at] ?? 0);
  }

  private goTo(x: number, y: number): void {
    this.x = Math.max(0, Math.min(this.columns - 1, x));
    this.y = Math.max(0, Math.min(this.rows - 1, y));
  }

  private act(sign: string): void {
    const count = this.value(0, 1);
    const x = Math.min(this.x, this.columns - 1);
    switch (sign) {
      case "A": return this.goTo(x, Math.max(this.y - count, this.y >= this.top ? this.top : 0));
      case "B": case "e": return this.goTo(x, Math.min(this.y + count, this.y <= this.bottom ? this.bottom : this.rows - 1));
      case "C": case "a": return this.goTo(x + count, this.y);
      case "D": return this.goTo(x - count, this.y);
      case "E": return this.goTo(0, this.y + count);
      case "F": return this.goTo(0, this.y - count);
      case "G": case "`": return this.goTo(count - 1, this.y);
      case "H": case "f": return this.goTo(this.value(1, 1) - 1, count - 1);
      case "d": return this.goTo(x, count - 1);
      case "J": return this.eraseScreen(this.parameters[0] ?? 0);
      case "K": return this.eraseRow(this.parameters[0] ?? 0);
      case "X": return this.erase(x, x + count);
      case "P": return this.shift(x, -count);
      case "@": return this.shift(x, count);
      case "L": case "M": return this.shiftRows(sign === "L", count);
      case "S": return this.scrollUp(count);
      case "T": return this.scrollDown(count);
      case "b": for (let left = Math.min(count, this.columns); left > 0 && this.last; left -= 1) this.put(this.last); return;
      case "h": case "l": if (this.parameters.includes(4)) this.inserts = sign === "h"; return;
      case "m": return this.paint();
      case "r": {
        const [top, bottom] = [count - 1, Math.min(this.rows, this.parameters[1] || this.rows) - 1];
        if (top < bottom) [this.top, this.bottom] = [top, bottom];
        return this.goTo(0, 0);
      }
      case "s": return this.save();
      case "u": return this.restore();
    }
  }

  private privateMode(mode: number, isOn: boolean): void {
    switch (mode) {
      case 1: this.hasApplicationKeys = isOn; return;
      case 7: this.wraps = isOn; return;
      case 25: this.isCursorShown = isOn; return;
      case 47: case 1047: case 1049:
        if (isOn && !this.kept) {
          if (mode === 1049) this.save();
          this.kept = this.shown;
          this.shown = Array.from({ length: this.rows }, () => this.blank());
        } else if (!isOn && this.kept) {
          this.leaveOther();
          if (mode === 1049) this.restore();
        }
        return;
      case 2004: this.hasBracketedPaste = isOn; return;
    }
  }

  /** Back from the screen that editors draw on. */
  private leaveOther(): void {
    if (!this.kept) return;
    this.shown = this.kept;
    this.kept = undefined;
    [this.top, this.bottom] = [0, this.rows - 1];
  }

  private gap(): Cell {
    return { sign: " ", look: this.look.back === -1 ? PLAIN : { ...PLAIN, back: this.look.back } };
  }

  private erase(from: number, until: number): void {
    this.row().cells.fill(this.gap(), from, Math.min(until, this.columns));
  }

  private eraseRow(how: number): void {
    const x = Math.min(this.x, this.columns - 1);
    if (how === 0) this.erase(x, this.columns);
    else if (how === 1) this.erase(0, x + 1);
    else if (how === 2) this.erase(0, this.columns);
  }

  private eraseScreen(how: number): void {
    if (how === 3) {
      this.past.length = 0;
      return;
    }
    if (how > 2) return;
    const here = this.y;
    if (how !== 2) this.eraseRow(how);
    const [from, until] = how === 0 ? [here + 1, this.rows] : [0, how === 1 ? here : this.rows];
    for (this.y = from; this.y < until; this.y += 1) this.erase(0, this.columns);
    this.y = here;
  }

  /** Moves what stands at the cursor and after it: to the right for room, to the left over what goes. */
  private shift(x: number, by: number): void {
    const { cells } = this.row();
    const count = Math.min(Math.abs(by), this.columns - x);
    const gaps = Array.from({ length: count }, () => this.gap());
    if (by > 0) {
      cells.splice(x, 0, ...gaps);
      cells.length = this.columns;
    } else {
      cells.splice(x, count);
      cells.push(...gaps);
    }
  }

  private shiftRows(isRoom: boolean, count: number): void {
    if (this.y < this.top || this.y > this.bottom) return;
    for (let left = Math.min(count, this.bottom - this.y + 1); left > 0; left -= 1) {
      this.shown.splice(isRoom ? this.bottom : this.y, 1);
      this.shown.splice(isRoom ? this.y : this.bottom, 0, this.blank());
    }
    this.x = 0;
  }

  private paint(): void {
    const values = this.parameters.length === 0 ? [0] : this.parameters;
    const look = { ...this.look };
    for (let at = 0; at < values.length; at += 1) {
      const value = values[at]!;
      if (value === 0) Object.assign(look, PLAIN);
      else if (value === 1) look.bold = true;
      else if (value === 2) look.faint = true;
      else if (value === 4) look.underlined = true;
      else if (value === 7) look.inverse = true;
      else if (value === 22) look.bold = look.faint = false;
      else if (value === 24) look.underlined = false;
      else if (value === 27) look.inverse = false;
      else if (value >= 30 && value <= 37) look.fore = value - 30;
      else if (value === 39) look.fore = -1;
      else if (value >= 40 && value <= 47) look.back = value - 40;
      else if (value === 49) look.back = -1;
      else if (value >= 90 && value <= 97) look.fore = value - 90 + 8;
      else if (value >= 100 && value <= 107) look.back = value - 100 + 8;
      else if (value === 38 || value === 48) {
        // Of the 256 colours the first 16 are ours; the others and those by red, green and blue stay as they were.
        if (values[at + 1] === 5) {
          const chosen = values[at + 2] ?? 16;
          if (chosen < 16) look[value === 38 ? "fore" : "back"] = chosen;
          at += 2;
        } else if (values[at + 1] === 2) at += 4;
      }
    }
    this.look = look;
  }
}
