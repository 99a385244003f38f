// The audit trail: every event with who caused it, newest first.
import { useState } from "preact/hooks";
import type { Event } from "../api/types";
import { eventMatches } from "../store/derive";
import { events, now, operations } from "../store/store";
import { ago, moment } from "../ui/format";
import { Empty, GuestLink, HostLink, Panel } from "../ui/parts";

function about(event: Event): string {
  const data = event.data as Record<string, unknown>;
  const parts: string[] = [];
  for (const key of ["phase", "name", "alarm", "event", "reason", "detail"]) {
    const value = data[key];
    if (typeof value === "string" && value) parts.push(value);
  }
  return parts.join(", ");
}

export function EventLine(props: { event: Event }) {
  const { event } = props;
  const reason = event.operation ? operations.value.get(event.operation)?.reason : undefined;
  return (
    <div class="event">
      <time dateTime={new Date(event.at_ms).toISOString()} title={moment(event.at_ms)}>{ago(event.at_ms, now.value)}</time>
      <b>{event.kind}</b>
      <span>
        {event.guest && <><GuestLink id={event.guest} /> </>}
        {event.host && <><HostLink id={event.host} /> </>}
        {event.operation && <a href={`#/operations/${event.operation}`}>operation</a>}{" "}
        {about(event)}{reason ? ` — ${reason}` : ""}
      </span>
      <span class="soft">{event.actor}</span>
    </div>
  );
}

export function Events() {
  const [filter, setFilter] = useState("");
  const words = filter.toLowerCase().split(/\s+/).filter(Boolean);
  const found = events.value.filter((event) => eventMatches(event, words)).slice(-500).reverse();
  return (
    <Panel title="Audit trail" wide aside={<input type="search" placeholder="filter" aria-label="filter events" value={filter} onInput={(event) => setFilter(event.currentTarget.value)} />}>
      {found.length === 0 ? <Empty>{words.length > 0 ? "No event matches." : "Nothing has happened yet."}</Empty> : found.map((event) => <EventLine key={event.seq} event={event} />)}
      <p class="small soft">The newest 2,000 events are kept here; <code>GET /v1/events</code> has all, each with the hash of the one before.</p>
    </Panel>
  );
}
