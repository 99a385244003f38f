import type { ComponentChildren } from "preact";
import { useEffect, useState } from "preact/hooks";
import { isEnded, label, rounds } from "../store/derive";
import { inReach } from "../store/done";
import { events, findOperation, guests, images, loadOlder, now, operations, operationsReach, samples } from "../store/store";
import { Cancel } from "../ui/actions";
import { Chart } from "../ui/chart";
import { ago, bytes, duration, moment, rate } from "../ui/format";
import { Empty, Facts, Grid, GuestLink, HostLink, Moving, Older, Panel, State, Steps, hostName } from "../ui/parts";
import { EventLine } from "./events";

export function Operations() {
  const reach = operationsReach.value;
  const found = inReach(operations.value.values(), reach);
  return (
    <Panel title={`Operations (${found.length}${reach.next === null ? "" : " newest"})`} wide aside={<Older isMore={reach.next !== null} load={loadOlder} />}>
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
  const [isAsked, setAsked] = useState("");
  useEffect(() => {
    if (operation) return;
    // Older than those that are known, it may be there all the same.
    void findOperation(props.id).catch(() => undefined).finally(() => setAsked(props.id));
  }, [props.id, Boolean(operation)]);
  if (!operation && isAsked !== props.id) return <Panel title="Operation" wide><Empty>…</Empty></Panel>;
  if (!operation) return <Panel title="No such operation" wide><Empty>There is no operation {props.id}, or this token does not see it.</Empty></Panel>;
  const { progress } = operation;
  const seen = samples.value.get(operation.id) ?? [];
  const told = events.value.filter((event) => event.operation === operation.id).reverse();
  const begun = operation.created_at_ms;
  const name = operation.guest ? guests.value.get(operation.guest)?.name : operation.image ? images.value.get(operation.image)?.name : undefined;
  const title = name ? `${label(operation)}: ${name}` : label(operation);
  // Only what this kind of operation has.
  const about: [string, ComponentChildren][] = [];
  if (operation.guest) about.push(["guest", <GuestLink id={operation.guest} />]);
  if (operation.part_of) about.push(["together with", <a href={`#/operations/${operation.part_of}`}>the other guests of its group</a>]);
  const parts = (operation.parts ?? []).map((id) => <><a href={`#/operations/${id}`}>{guests.value.get(operations.value.get(id)?.guest ?? "")?.name ?? id}</a>{" "}</>);
  if (parts.length > 0) about.push(["guests", parts]);
  if (operation.image) about.push(["image", <a href={`#/images/${operation.image}`}>{images.value.get(operation.image)?.name ?? operation.image}</a>]);
  if (operation.source) about.push(["from", <HostLink id={operation.source} />]);
  if (operation.destination) about.push(["to", <HostLink id={operation.destination} />]);
  const moved: [string, string][] = [];
  const isNumber = (value: number | null | undefined): value is number => value !== null && value !== undefined;
  if (isNumber(progress.downtime_ms)) moved.push(["pause", duration(progress.downtime_ms)]);
  if (progress.memory_total_bytes > 0) {
    const round = progress.round > 0 ? `, round ${progress.round}` : "";
    moved.push([operation.kind === "image_import" ? "stored" : "memory sent", `${bytes(progress.memory_sent_bytes)} of ${bytes(progress.memory_total_bytes)}${round}`]);
  }
  if ((progress.memory_missing_bytes ?? 0) > 0) moved.push(["memory still missing", bytes(progress.memory_missing_bytes!)]);
  if (isNumber(progress.disk_bytes_before_resume)) moved.push(["disk before it ran", bytes(progress.disk_bytes_before_resume)]);
  if (isNumber(progress.disk_bytes_after_resume)) moved.push(["disk after it ran", bytes(progress.disk_bytes_after_resume)]);
  if (progress.disk_missing_bytes > 0) moved.push(["disk still missing", bytes(progress.disk_missing_bytes)]);
  const byRound = rounds(seen).map((one) => ({ ...one, id: String(one.round) }));
  return (
    <div class="tiles">
      <Panel title={title} wide aside={<Cancel operation={operation} />}>
        <Moving operation={operation} />
        <Steps operation={operation} />
        {operation.error && <p class={operation.phase === "failed" ? "bad" : "warn"} role="alert">{operation.error.detail}</p>}
        <Facts rows={[
          ...about,
          ["asked by", operation.actor],
          ["why", operation.reason ?? "–"],
          ["begun", moment(begun)],
          ["took", duration((operation.ended_at_ms ?? now.value) - begun)],
          ["request", <code>{operation.request_id}</code>],
          ...moved,
        ]} />
      </Panel>
      {seen.length > 1 && (
        <Panel title="Round by round" wide>
          <Chart label="memory that remains and how fast the guest writes" x={seen.map((one) => one.at)}
            series={[{ name: "remaining", values: seen.map((one) => one.remaining), strong: true }, { name: "sent", values: seen.map((one) => one.sent) }]}
            y={bytes} xText={(at) => `+${duration(Math.max(0, at - begun))}`} />
          {byRound.length > 0 && (
            <Grid name="rounds" items={byRound} empty="" columns={[
              { title: "round", key: (one) => one.round, show: (one) => one.round },
              { title: "sent", key: (one) => one.sent, show: (one) => bytes(one.sent) },
              { title: "remained", key: (one) => one.remaining, show: (one) => bytes(one.remaining) },
              { title: "took", key: (one) => one.took, show: (one) => duration(one.took) },
              { title: "guest wrote up to", key: (one) => one.dirty, show: (one) => rate(one.dirty), wide: true },
              { title: "link up to", key: (one) => one.bandwidth, show: (one) => rate(one.bandwidth), wide: true },
            ]} />
          )}
          <p class="small soft">As this page saw it, once a second. Now {rate(progress.bandwidth_bytes_per_s)} over the link, the guest writes {rate(progress.dirty_bytes_per_s)}</p>
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
