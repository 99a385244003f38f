// The event stream. `EventSource` hands out named events by name only and retries on its own terms, so it is read with `fetch`:
// the same format, resumed with `Last-Event-ID`.
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
      const event = JSON.parse(data) as Event;
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

/** Follows the stream until `signal`; backlog is how many past events come first. */
export async function follow(backlog: number, listener: Listener, signal: AbortSignal): Promise<void> {
  let last: number | undefined;
  let wait = 500;
  let failures = 0;
  while (!signal.aborted) {
    let status: number | undefined;
    try {
      const path = last === undefined ? `/v1/events/stream?last=${backlog}` : "/v1/events/stream";
      const headers: Record<string, string> = last === undefined ? {} : { "last-event-id": String(last) };
      const response = await fetch(path, { headers, signal, credentials: "same-origin" });
      status = response.status;
      if (response.ok && response.body) {
        listener.onOpen();
        wait = 500;
        failures = 0;
        const parser = new StreamParser();
        const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
        for (;;) {
          const { done, value } = await reader.read();
          if (done) break;
          const events = parser.push(value);
          if (events.length > 0) {
            last = events[events.length - 1]!.seq;
            listener.onEvents(events);
          }
        }
      }
    } catch {
      // Told below.
    }
    if (signal.aborted) return;
    failures += 1;
    // A stream ends now and then (a proxy's patience, another network); that it does not come back is worth telling.
    if (failures > 1 || status === 401) listener.onBroken(status);
    await new Promise((resolve) => setTimeout(resolve, wait));
    wait = Math.min(wait * 2, 10_000);
  }
}
