// The mirror of a guest: how far its standby is, and having it take over.
import { useEffect, useState } from "preact/hooks";
import { list } from "../api/http";
import type { Mirror, Operation } from "../api/types";
import { may } from "../store/derive";
import { hosts, learn, samples, who } from "../store/store";
import { Cancel } from "./actions";
import { Chart } from "./chart";
import { Sure } from "./dialog";
import { bytes, duration } from "./format";
import { Facts, HostLink, Panel, hostName } from "./parts";

function TakeOver(props: { guest: string; name: string; operation: Operation }) {
  const [isOpen, setOpen] = useState(false);
  const [isDead, setDead] = useState(false);
  const source = props.operation.source ? hosts.value.get(props.operation.source) : undefined;
  // Of a host that is there the guest is migrated away.
  if (!may(who.value, "change") || source?.state !== "unreachable") return null;
  return (
    <>
      <button onClick={() => { setDead(false); setOpen(true); }}>Take over…</button>
      {isOpen && (
        <Sure title={`${hostName(props.operation.destination)} takes ${props.name} over`} verb="Take over now" isReady={isDead} close={() => setOpen(false)} done={(told: Operation | undefined) => { if (told) learn(told); }}
          ask={{ method: "POST", path: `/v1/guests/${props.guest}/failover`, body: { host_is_dead: isDead } }}>
          <p>Were {source.name} alive, two copies of the guest would run, which does harm that nobody could undo.</p>
          <label class="inline"><input type="checkbox" checked={isDead} onChange={(event) => setDead(event.currentTarget.checked)} /> {source.name} does not run any more and will not run this guest again: the provider says so, or I switched it off.</label>
        </Sure>
      )}
    </>
  );
}

/** Leases run out in seconds. */
const AGAIN_MS = 2000;

/** Who may say that the guest does not run any more: the clock, and how far that is. */
function fencing(mirror: Mirror): [string, preact.ComponentChildren][] {
  if (mirror.fencing !== "lease") return [["who says that its host is dead", "an operator, or the host's provider"]];
  const over = mirror.lease_over_in_ms ?? 0;
  const silent = mirror.source_silent_ms ?? 0;
  const isHeard = silent < (mirror.lease_ms ?? 0) / 2;
  return [
    ["fenced by a lease of", duration(mirror.lease_ms ?? 0)],
    ["its host was heard", silent < 2000 ? "now" : <span class={isHeard ? "" : "bad"}>{duration(silent)} ago</span>],
    [isHeard ? "without another word the lease is over in" : "its standby takes over in", <span class={isHeard ? "" : "bad"}>{duration(over)}</span>],
  ];
}

export function MirrorPanel(props: { guest: string; name: string; operation: Operation }) {
  const { operation } = props;
  const [mirror, setMirror] = useState<Mirror>();
  useEffect(() => {
    let isHere = true;
    const ask = () => list<Mirror>(`/v1/guests/${props.guest}/mirrors`).then(
      (found) => { if (isHere) setMirror(found[0]); },
      // What was shown stays.
      () => undefined,
    );
    void ask();
    const timer = setInterval(() => void ask(), AGAIN_MS);
    return () => {
      isHere = false;
      clearInterval(timer);
    };
  }, [operation.id, operation.phase]);
  const standing = operation.progress.mirror;
  const isProtected = (standing?.committed ?? 0) > 0 && operation.phase === "copy";
  const ages = (samples.value.get(operation.id) ?? []).filter((sample) => sample.mirrorAge !== null);
  return (
    <Panel title="Mirror" wide aside={<span class="line"><span class={`state ${isProtected ? "good" : "busy"}`}>{isProtected ? "its standby could take over" : mirror?.is_failing_over ? "taking over" : "no whole cut yet"}</span><TakeOver {...props} /><Cancel operation={operation} /></span>}>
      <Facts rows={[
        ["stands by at", <HostLink id={operation.destination} />],
        ...(mirror ? [
          ["what it says to the network", mirror.mode === "strict" ? "waits for the standby" : "goes out at once"] as [string, string],
          ["a cut every", duration(mirror.interval_ms)] as [string, string],
          ...fencing(mirror),
        ] : []),
        ...(standing ? [
          ["cuts begun", String(standing.cut)] as [string, string],
          ["whole at the standby", String(standing.committed)] as [string, string],
          ["taking over would lose at most", !isProtected ? "–" : mirror?.mode === "strict" ? `nothing that anybody has seen (it is ${duration(standing.committed_age_ms)} behind)` : duration(standing.committed_age_ms)] as [string, string],
          ...(mirror?.fencing === "lease" && !standing.is_leased ? [["obeys its lease", <span class="warn">not yet: until then nobody takes over by himself</span>] as [string, preact.ComponentChildren]] : []),
          ["pause of the last cut", duration(standing.pause_ms)] as [string, string],
          ["written between the last two", bytes(standing.dirty_bytes)] as [string, string],
        ] : []),
      ]} />
      {ages.length > 1 && <Chart label="how old the standby's copy is" x={ages.map((one) => one.at)} series={[{ name: "the standby is behind by", values: ages.map((one) => one.mirrorAge), strong: true }]} y={duration} xText={(at) => `+${duration(Math.max(0, at - ages[0]!.at))}`} height={160} />}
    </Panel>
  );
}
