// What keys say to a console: as xterm and the Linux console have it.

interface Key { key: string; ctrlKey: boolean; altKey: boolean; metaKey: boolean; shiftKey: boolean }

const CURSOR: Record<string, string> = { ArrowUp: "A", ArrowDown: "B", ArrowRight: "C", ArrowLeft: "D", Home: "H", End: "F" };
const NAMED: Record<string, string> = {
  Enter: "\r", Backspace: "\x7f", Tab: "\t", Escape: "\x1b", Insert: "\x1b[2~", Delete: "\x1b[3~", PageUp: "\x1b[5~", PageDown: "\x1b[6~",
  F1: "\x1bOP", F2: "\x1bOQ", F3: "\x1bOR", F4: "\x1bOS", F5: "\x1b[15~", F6: "\x1b[17~", F7: "\x1b[18~", F8: "\x1b[19~", F9: "\x1b[20~",
  F10: "\x1b[21~", F11: "\x1b[23~", F12: "\x1b[24~",
};

/** What a key types; `undefined` where the browser has it: signs, which come as text, and its own short cuts. */
export function typed(key: Key, hasApplicationKeys: boolean): string | undefined {
  if (key.metaKey) return undefined;
  const escape = key.altKey ? "\x1b" : "";
  if (key.key.length === 1) {
    // Ctrl-V pastes here, and Ctrl-Shift with a letter is the browser's.
    if (key.ctrlKey && !key.altKey && !key.shiftKey) {
      const low = key.key.toLowerCase();
      if (low === "v") return undefined;
      if (low >= "a" && low <= "z") return String.fromCharCode(low.charCodeAt(0) - 96);
      const sign = { "@": 0, " ": 0, "[": 27, "\\": 28, "^": 30, "_": 31 }[low];
      return sign === undefined ? undefined : String.fromCharCode(sign);
    }
    return key.altKey && !key.ctrlKey && key.key.charCodeAt(0) < 0x7f ? escape + key.key : undefined;
  }
  if (key.key === "Tab" && key.shiftKey) return "\x1b[Z";
  if (key.key in CURSOR) {
    if (key.ctrlKey || key.altKey) return `\x1b[1;${1 + (key.altKey ? 2 : 0) + (key.ctrlKey ? 4 : 0)}${CURSOR[key.key]}`;
    return `\x1b${hasApplicationKeys ? "O" : "["}${CURSOR[key.key]}`;
  }
  if (key.ctrlKey) return undefined;
  const found = NAMED[key.key];
  return found === undefined ? undefined : escape + found;
}

/** Text that was pasted: lines end as Enter ends them, and it cannot end the marks around it. */
export function pasted(text: string, isBracketed: boolean): string {
  const lines = text.replace(/\r?\n/g, "\r");
  return isBracketed ? `\x1b[200~${lines.replaceAll("\x1b", "")}\x1b[201~` : lines;
}
