// The audit trail: every event with who caused it, newest first.
import { useState } from "preact/hooks";
import type { Event } from "../api/types";
import { texts } from "../api/stream";
import { type Told, verify } from "../store/chain";
import { eventMatches } from "../store/derive";
import { events, now, operations } from "../store/store";
import { ago, moment } from "../ui/format";
import { Empty, GuestLink, HostLink, Panel } from "../ui/parts";

function about(event: Event): string {
  const data = event.data as Record<string, unknown>;
  const parts: string[] = [];
  for (const key of ["phase", event.guest ? "" : "name", "alarm", "event", "reason", "detail"]) {
    const value = data[key];
    if (typeof value === "string" && value) parts.push(value);
  }
  return parts.join(", ");
}

/** Events of plans name the plan in what they tell. */
function PlanTold(props: { event: Event }) {
  const { plan, kind, state } = props.event.data as Record<string, unknown>;
  if (!props.event.kind.startsWith("plan.") || typeof plan !== "string") return null;
  return <><a href={`#/plans/${plan}`}>{String(kind)} plan</a> {String(state).replaceAll("_", " ")}</>;
}

export function EventLine(props: { event: Event; full?: boolean }) {
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
        <PlanTold event={event} />
        {about(event)}{reason ? ` — ${reason}` : ""}
      </span>
      <span class="soft" title={`request ${event.request_id}, event ${event.seq}`}>{event.actor}{props.full && <small><br /><code>{event.request_id}</code></small>}</span>
    </div>
  );
}

const known = new WeakSet<Event>();

/** Whether the chain of what this page has holds, worked out here and not believed. */
function Chain() {
  const told = events.value.map((event): Told => ({ event, text: texts.get(event) ?? "" }));
  if (told.length === 0) return null;
  const { checked, broken, gaps } = verify(told, known);
  if (broken.length > 0) {
    return <p class="bad" role="alert">The chain is broken: event {broken.slice(0, 5).join(", ")} is not what was written, or does not follow the one before.</p>;
  }
  const from = told[0]!.event.seq;
  return (
    <p class="good" role="status">
      ✓ {checked} events, number {from} to {told[checked - 1]!.event.seq}: each has the hash of its own text
      {gaps === 0 ? " and names that of the one before." : ", and names that of the one before where this token sees it."}
    </p>
  );
}

export function Events() {
  const [filter, setFilter] = useState("");
  const words = filter.toLowerCase().split(/\s+/).filter(Boolean);
  const found = events.value.filter((event) => eventMatches(event, words)).slice(-500).reverse();
  return (
    <Panel title="Audit trail" wide aside={<input type="search" placeholder="filter" aria-label="filter events" value={filter} onInput={(event) => setFilter(event.currentTarget.value)} />}>
      <Chain />
      {found.length === 0 ? <Empty>{words.length > 0 ? "No event matches." : "Nothing has happened yet."}</Empty> : found.map((event) => <EventLine key={event.seq} event={event} full />)}
      <p class="small soft">The newest 2,000 events are kept here, 500 of those before it was opened; <code>GET /v1/events</code> has all.</p>
    </Panel>
  );
}
