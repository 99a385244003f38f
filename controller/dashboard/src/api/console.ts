// A guest's console: its stream, followed wherever the guest goes, and what is typed.
import { Away, Refused, once } from "./http";

/** What the controller says last, in brackets, when another reader took the console. */
const TAKEN = "another console of the guest was opened";
/** How long a guest that has left its host is looked for: a move's switch, a controller's restart. */
const FOLLOW_MS = 120_000;
const PAUSE_MS = 500;
/** Of what was said, to know it again in the past that the next host shows first. */
const KNOWN_BYTES = 256;
const LEAST_KNOWN = 16;
/** A host shows less of the past than this, and in less than this time: until then what is known already is looked for in it. */
const MOST_PAST = 32 << 10;
const PAST_MS = 400;
/** What one request may type. */
const MOST_TYPED = 16 << 10;
/** What may wait to be typed; what is beyond is lost, as on a real console. */
const MOST_WAITING = 256 << 10;

export type Standing = "opening" | "open" | "following" | "taken" | "ended";

export interface Watcher {
  onBytes(bytes: Uint8Array): void;
  onStanding(standing: Standing, why: string): void;
}

/** Why a stream ended, if its end says so: `[why]` on a line of its own. */
export function parting(end: Uint8Array): string | undefined {
  return /\r\n\[([^\r\n]{0,200})\]\r\n$/.exec(new TextDecoder().decode(end))?.[1];
}

/** What of a host's past comes after the bytes that are known; absent where these are not in it. */
export function unseen(past: Uint8Array, known: Uint8Array): Uint8Array | undefined {
  for (let from = past.length - known.length; from >= 0; from -= 1) {
    let same = 0;
    while (same < known.length && past[from + same] === known[same]) same += 1;
    if (same === known.length) return past.subarray(from + same);
  }
  return undefined;
}

const joined = (a: Uint8Array, b: Uint8Array): Uint8Array => {
  const both = new Uint8Array(a.length + b.length);
  both.set(a);
  both.set(b, a.length);
  return both;
};

function base64(bytes: Uint8Array): string {
  let text = "";
  for (const byte of bytes) text += String.fromCharCode(byte);
  return btoa(text);
}

export class ConsoleLine {
  private number: string | undefined;
  private readonly stop = new AbortController();
  private known = new Uint8Array();
  private waiting: Uint8Array = new Uint8Array();
  private isSending = false;

  constructor(private readonly guest: string, private readonly watcher: Watcher) {}

  /** Shows the console until it is closed, taken or lost for good. */
  async run(): Promise<void> {
    const { signal } = this.stop;
    this.watcher.onStanding("opening", "");
    let until: number | undefined;
    for (;;) {
      let why: string | undefined;
      let wasOpen = false;
      try {
        why = await this.look(() => {
          wasOpen = true;
          this.watcher.onStanding("open", "");
        });
      } catch (error) {
        why = error instanceof Refused ? error.problem.detail : error instanceof Away ? error.message : String(error);
        // What cannot be had at all is said at once; what was had is looked for.
        if (!wasOpen && until === undefined && error instanceof Refused) return this.over("ended", why);
      }
      this.number = undefined;
      if (signal.aborted) return;
      if (why === TAKEN) return this.over("taken", "");
      if (wasOpen) until = undefined;
      until ??= Date.now() + FOLLOW_MS;
      if (Date.now() >= until) return this.over("ended", why ?? "");
      this.watcher.onStanding("following", why ?? "");
      await new Promise((resolve) => setTimeout(resolve, PAUSE_MS));
      if (signal.aborted) return;
    }
  }

  private over(standing: Standing, why: string): void {
    this.watcher.onStanding(standing, why);
  }

  private async look(onOpen: () => void): Promise<string | undefined> {
    const response = await once("GET", `/v1/guests/${this.guest}/console`, undefined, this.stop.signal);
    this.number = response.headers.get("supercloud-console") ?? undefined;
    onOpen();
    const reader = response.body!.getReader();
    let end: Uint8Array = new Uint8Array();
    const show = (bytes: Uint8Array) => {
      end = joined(end, bytes).slice(-512);
      this.watcher.onBytes(bytes);
    };
    // The past comes in pieces, and nothing says where it ends. A few bytes would be found anywhere.
    let held: Uint8Array | undefined = this.known.length < LEAST_KNOWN ? undefined : new Uint8Array();
    const release = () => {
      if (!held) return;
      const bytes = unseen(held, this.known) ?? held;
      held = undefined;
      if (bytes.length > 0) show(bytes);
    };
    const timer = setTimeout(release, PAST_MS);
    try {
      for (;;) {
        const { done, value } = await reader.read();
        if (done) break;
        if (!held) show(value);
        else {
          held = joined(held, value);
          if (held.length >= MOST_PAST) release();
        }
      }
    } finally {
      clearTimeout(timer);
      if (!this.stop.signal.aborted) release();
      const why = parting(end);
      // The parting words are not the guest's: its past does not have them.
      const told = why === undefined ? end : end.subarray(0, end.length - new TextEncoder().encode(why).length - 6);
      if (told.length > 0) this.known = joined(this.known, told).slice(-KNOWN_BYTES);
    }
    return parting(end);
  }

  /** Types; in order, and not again where it is not known whether it arrived. */
  type(text: string): void {
    if (this.number === undefined) return;
    this.waiting = joined(this.waiting, new TextEncoder().encode(text)).slice(0, MOST_WAITING);
    if (!this.isSending) void this.send();
  }

  private async send(): Promise<void> {
    this.isSending = true;
    while (this.waiting.length > 0 && !this.stop.signal.aborted) {
      const piece = this.waiting.slice(0, MOST_TYPED);
      this.waiting = this.waiting.slice(MOST_TYPED);
      if (this.number === undefined) continue;
      try {
        await once("POST", `/v1/guests/${this.guest}/console/${this.number}/input`, { data: base64(piece) }, this.stop.signal);
      } catch {
        // The console went meanwhile: what is typed into nothing is lost, and the stream's end says why.
      }
    }
    this.isSending = false;
  }

  close(): void {
    this.stop.abort();
  }
}
