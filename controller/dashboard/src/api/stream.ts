// The event stream. `EventSource` hands out named events by name only and retries on its own terms, so it is read with `fetch`:
// the same format, resumed with `Last-Event-ID`.
import { heard } from "./http";
import type { Event } from "./types";

/** Events' own text, letter by letter: their hashes are over it. */
export const texts = new WeakMap<Event, string>();

/** Takes pieces of a `text/event-stream` and gives the events that are whole. */
export class StreamParser {
  private rest = "";

  push(piece: string): Event[] {
    this.rest += piece;
    const blocks = this.rest.split("\n\n");
    this.rest = blocks.pop() ?? "";
    const events: Event[] = [];
    for (const block of blocks) {
      const data = block
        .split("\n")
        .filter((line) => line.startsWith("data:"))
        .map((line) => line.slice(5).trimStart())
        .join("\n");
      if (!data) continue;
      let event: Event;
      try {
        event = JSON.parse(data) as Event;
      } catch (error) {
        // The chain's check tells that one is missing; the others are told all the same.
        console.warn(error);
        continue;
      }
      texts.set(event, data);
      events.push(event);
    }
    return events;
  }
}

export interface Listener {
  onEvents(events: Event[]): void;
  onOpen(): void;
  onBroken(status: number | undefined): void;
}

/** The controller says something every 15 s, if only that it is there. */
const SILENT_MS = 40_000;
/** How long a stream may take to begin. */
const BEGIN_MS = 15_000;

/** What `work` gives, or nothing when it takes too long. */
async function within<T>(work: Promise<T>, ms: number): Promise<T | undefined> {
  let timer: ReturnType<typeof setTimeout> | undefined;
  const late = new Promise<undefined>((resolve) => { timer = setTimeout(() => resolve(undefined), ms); });
  try {
    return await Promise.race([work, late]);
  } finally {
    clearTimeout(timer);
  }
}

/** Follows the stream until `signal`; backlog is how many past events come first. */
export async function follow(backlog: number, listener: Listener, signal: AbortSignal): Promise<void> {
  let last: number | undefined;
  let wait = 500;
  let failures = 0;
  while (!signal.aborted) {
    let status: number | undefined;
    // A way that is cut without a word (a machine that went to sleep, a firewall) ends no connection: silence does.
    const attempt = new AbortController();
    const late = setTimeout(() => attempt.abort(), BEGIN_MS);
    try {
      const path = last === undefined ? `/v1/events/stream?last=${backlog}` : "/v1/events/stream";
      const headers: Record<string, string> = last === undefined ? {} : { "last-event-id": String(last) };
      const response = await fetch(path, { headers, signal: AbortSignal.any([signal, attempt.signal]), credentials: "same-origin" });
      clearTimeout(late);
      status = response.status;
      if (response.ok && response.body) {
        listener.onOpen();
        wait = 500;
        failures = 0;
        const parser = new StreamParser();
        const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
        for (;;) {
          const piece = await within(reader.read(), SILENT_MS);
          if (!piece) {
            // It is told at once: what is shown may be old already.
            failures = 1;
            status = undefined;
            attempt.abort();
            break;
          }
          if (piece.done) break;
          heard.value = Date.now();
          const events = parser.push(piece.value);
          if (events.length > 0) {
            last = events[events.length - 1]!.seq;
            listener.onEvents(events);
          }
        }
      }
    } catch {
      // Told below.
    } finally {
      clearTimeout(late);
    }
    if (signal.aborted) return;
    failures += 1;
    // A stream ends now and then (a proxy's patience, another network); that it does not come back is worth telling.
    if (failures > 1 || status === 401) listener.onBroken(status);
    await new Promise((resolve) => setTimeout(resolve, wait));
    wait = Math.min(wait * 2, 10_000);
  }
}
