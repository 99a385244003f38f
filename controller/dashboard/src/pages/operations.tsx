import { isEnded, label } from "../store/derive";
import { events, now, operations, samples } from "../store/store";
import { Cancel } from "../ui/actions";
import { Chart } from "../ui/chart";
import { ago, bytes, duration, moment, rate } from "../ui/format";
import { Empty, Facts, Grid, GuestLink, HostLink, Moving, Panel, State, Steps, hostName } from "../ui/parts";
import { EventLine } from "./events";

export function Operations() {
  const found = [...operations.value.values()].sort((a, b) => b.created_at_ms - a.created_at_ms);
  return (
    <Panel title={`Operations (${found.length})`} wide>
      <Grid name="operations" tall items={found} empty="Nothing has been done yet." columns={[
        { title: "what", show: (operation) => <a href={`#/operations/${operation.id}`}>{label(operation)}</a> },
        { title: "guest", show: (operation) => <GuestLink id={operation.guest} /> },
        { title: "state", show: (operation) => <State of={operation.phase} /> },
        { title: "way", show: (operation) => `${hostName(operation.source)} → ${hostName(operation.destination)}` },
        { title: "took", show: (operation) => duration((operation.ended_at_ms ?? now.value) - operation.created_at_ms), wide: true },
        { title: "pause", show: (operation) => (operation.progress.downtime_ms ?? null) === null ? "–" : duration(operation.progress.downtime_ms!), wide: true },
        { title: "begun", show: (operation) => ago(operation.created_at_ms, now.value), wide: true },
        { title: "by", show: (operation) => operation.actor, wide: true },
      ]} />
    </Panel>
  );
}

export function OperationPage(props: { id: string }) {
  const operation = operations.value.get(props.id);
  if (!operation) return <Panel title="No such operation" wide><Empty>There is no operation {props.id}, or this token does not see it.</Empty></Panel>;
  const { progress } = operation;
  const seen = samples.value.get(operation.id) ?? [];
  const told = events.value.filter((event) => event.operation === operation.id).reverse();
  const begun = operation.created_at_ms;
  return (
    <div class="tiles">
      <Panel title={`${label(operation)} ${operation.guest ? "of a guest" : ""}`} wide aside={<Cancel operation={operation} />}>
        <Moving operation={operation} />
        <Steps operation={operation} />
        {operation.error && <p class={operation.phase === "failed" ? "bad" : "warn"} role="alert">{operation.error.detail}</p>}
        <Facts rows={[
          ["guest", <GuestLink id={operation.guest} />],
          ["from", <HostLink id={operation.source} />],
          ["to", <HostLink id={operation.destination} />],
          ["asked by", operation.actor],
          ["why", operation.reason ?? "–"],
          ["begun", moment(begun)],
          ["took", duration((operation.ended_at_ms ?? now.value) - begun)],
          ["pause", (progress.downtime_ms ?? null) === null ? "–" : duration(progress.downtime_ms!)],
          ["memory sent", progress.memory_total_bytes > 0 ? `${bytes(progress.memory_sent_bytes)} of ${bytes(progress.memory_total_bytes)}, round ${progress.round}` : "–"],
          ["disk before / after it ran", [progress.disk_bytes_before_resume, progress.disk_bytes_after_resume].map((one) => (one ?? null) === null ? "–" : bytes(one!)).join(" / ")],
          ["disk still missing", bytes(progress.disk_missing_bytes)],
        ]} />
      </Panel>
      {seen.length > 1 && (
        <Panel title="Round by round" wide>
          <Chart label="memory that remains and how fast the guest writes" x={seen.map((one) => one.at)}
            series={[{ name: "remaining", values: seen.map((one) => one.remaining), strong: true }, { name: "sent", values: seen.map((one) => one.sent) }]}
            y={bytes} xText={(at) => `+${duration(Math.max(0, at - begun))}`} />
          <p class="small soft">now {rate(progress.bandwidth_bytes_per_s)} over the link, the guest writes {rate(progress.dirty_bytes_per_s)}</p>
        </Panel>
      )}
      {operation.plan && operation.plan.checks.length > 0 && (
        <Panel title="What was checked before">
          {operation.plan.checks.map((check) => <p key={check.name} class={check.is_ok ? "good" : "bad"}>{check.is_ok ? "✓" : "✗"} {check.name.replaceAll("_", " ")}: {check.detail}</p>)}
        </Panel>
      )}
      <Panel title="Its events" wide>
        {told.map((event) => <EventLine key={event.seq} event={event} />)}
        {told.length === 0 && <Empty>{isEnded(operation.phase) ? "older than the events that this page has" : "none yet"}</Empty>}
      </Panel>
    </div>
  );
}
