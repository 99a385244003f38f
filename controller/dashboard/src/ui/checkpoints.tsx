// A guest's checkpoints: how old the newest is, taking one, and going back to one.
import { useState } from "preact/hooks";
import { change } from "../api/http";
import type { Guest, Operation, VolumeHistory, VolumePoint } from "../api/types";
import { go } from "../router";
import { may } from "../store/derive";
import { clouds, hosts, learn, now, who } from "../store/store";
import { useAnswer } from "./answer";
import { Dialog, useAttempt } from "./dialog";
import { ago, bytes, duration, moment } from "./format";
import { Empty, Facts, Panel } from "./parts";

const EVERY_MS = 15_000;

function GoBack(props: { guest: Guest; point: VolumePoint; close: () => void }) {
  const { guest, point } = props;
  const [place, setPlace] = useState("");
  const [trial, setTrial] = useState<Operation>();
  const { isWorking, problem, attempt } = useAttempt();
  const path = `/v1/guests/${guest.id}/thaw`;
  const wanted = () => ({ checkpoint: true, point: point.number, ...(place ? { to: place } : {}) });
  const rehearse = () => attempt(async () => setTrial(await change<Operation>("POST", `${path}?dry_run=true`, wanted())));
  const carryOut = () => attempt(async () => {
    const operation = await change<Operation>("POST", path, wanted());
    if (!operation) return;
    learn(operation);
    props.close();
    go(`/operations/${operation.id}`);
  });
  const checks = trial?.plan?.checks ?? [];
  const isFit = trial !== undefined && checks.every((check) => check.is_ok);
  return (
    <Dialog title={`${guest.name} goes back to checkpoint ${point.number}`} close={props.close} submit={() => void (isFit ? carryOut() : rehearse())}>
      <p>It goes on as it was at {moment(point.at_ms)}, with its processes. <b>What it wrote in the {duration(Math.max(0, now.value - point.at_ms))} since, to memory and disk, is given up.</b></p>
      <label>Where to
        <select value={place} onChange={(event) => { setPlace(event.currentTarget.value); setTrial(undefined); }}>
          <option value="">anywhere with room</option>
          <optgroup label="Clouds">{[...clouds.value.values()].map((one) => <option key={one.id} value={one.id}>{one.name}{one.id === point.cloud ? " (where it lies)" : ""}</option>)}</optgroup>
          <optgroup label="Hosts">{[...hosts.value.values()].filter((one) => one.state === "up").map((one) => <option key={one.id} value={one.id}>{one.name} in {one.cloud_name}</option>)}</optgroup>
        </select>
      </label>
      {trial && (
        <div class="checks" role="status">
          {checks.map((check) => <p key={check.name} class={check.is_ok ? "good" : "bad"}>{check.is_ok ? "✓" : "✗"} {check.name.replaceAll("_", " ")}: {check.detail}</p>)}
          {checks.length === 0 && <p class="good">✓ it can be done now</p>}
        </div>
      )}
      {problem && <p class="bad" role="alert">{problem}</p>}
      <div class="line">
        <button type="button" onClick={props.close}>Close</button>
        <span class="grow" />
        <button class="main" disabled={isWorking}>{isFit ? "Go back now" : "Check first"}</button>
      </div>
    </Dialog>
  );
}

export function Checkpoints(props: { guest: Guest; told: number }) {
  const { guest } = props;
  const volume = guest.volumes[0];
  const history = useAnswer<VolumeHistory>(`/v1/volumes/${volume ?? "none"}/history`, `${props.told}`, EVERY_MS);
  const [back, setBack] = useState<VolumePoint>();
  const [said, setSaid] = useState("");
  const { isWorking, problem, attempt } = useAttempt();
  if (!volume) return null;
  const all = history.value?.points ?? [];
  const kept = all.filter((point) => point.memory?.is_kept);
  const newest = kept[kept.length - 1];
  const policy = history.value?.policy;
  const mayTake = may(who.value, "change") && guest.state === "running" && !guest.operation;
  const mayGoBack = may(who.value, "move") && !guest.operation && (guest.state === "lost" || guest.state === "stopped");
  if (!newest && !mayTake && !policy?.memory) return null;
  const take = () => attempt(async () => {
    await change("POST", `/v1/guests/${guest.id}/checkpoints`);
    setSaid("A checkpoint is being taken while it runs; it is shown here when it is.");
    history.again();
  });
  return (
    <Panel title="Checkpoints" aside={<span class="line">
      {mayTake && <button disabled={isWorking} onClick={() => void take()}>Take one now</button>}
      {mayGoBack && newest && <button onClick={() => setBack(newest)}>Go back to the newest…</button>}
    </span>}>
      {problem && <p class="bad" role="alert">{problem}</p>}
      {said && <p class="small" role="status">{said}</p>}
      {policy?.memory && history.value?.problem && <p class="warn" role="alert">The last one that was due was not taken: {history.value.problem}</p>}
      {newest ? (
        <Facts rows={[
          ["newest", `point ${newest.number}, ${ago(newest.at_ms, now.value)}`],
          ["going back would lose at most", duration(Math.max(0, now.value - newest.at_ms))],
          ["its memory", bytes(newest.memory?.bytes ?? 0)],
          ["lies in", clouds.value.get(newest.cloud)?.name ?? newest.cloud],
          ["kept", `${kept.length}${policy?.memory ? ` of the newest ${policy.memory}` : ""}`],
        ]} />
      ) : <Empty>None is kept{policy?.memory ? " yet" : ": after a loss it could only boot from its disk"}.</Empty>}
      <p class="small soft">{policy?.memory && policy.every_s ? `One is taken every ${duration(policy.every_s * 1000)} while it runs` : "Taken when asked for only"}; <a href={`#/volumes/${volume}`}>how points are kept</a>.</p>
      {mayGoBack && kept.length > 1 && (
        <details><summary>older ones</summary>
          <ul class="plain">{kept.slice(0, -1).reverse().map((point) => <li key={point.number} class="line">point {point.number}, {moment(point.at_ms)} <span class="grow" /><button onClick={() => setBack(point)}>Go back…</button></li>)}</ul>
        </details>
      )}
      {back && <GoBack guest={guest} point={back} close={() => setBack(undefined)} />}
    </Panel>
  );
}
