// Time travel: a volume's points on a slider, the point that an instant means, and a new guest from it.
import { useMemo, useState } from "preact/hooks";
import { change } from "../api/http";
import type { Guest, GuestCreate, HistoryPolicy, Operation, Volume, VolumeHistory, VolumePoint } from "../api/types";
import { go } from "../router";
import { may } from "../store/derive";
import { clouds, guests, hosts, images, learn, networks, now, ports, who } from "../store/store";
import { verifyPoints } from "../store/points";
import { bands, bandsText, everyText, marks, pointAsOf, seconds, stored } from "../store/travel";
import type { Answer } from "./answer";
import { Dialog, Sure, useAttempt } from "./dialog";
import { ago, bytes, duration, moment } from "./format";
import { Empty, Facts, Grid, Panel } from "./parts";

const cloudName = (id: string): string => clouds.value.get(id)?.name ?? id;

/** Steps of the slider between its ends: fine enough to meet a minute of a week. */
const STEPS = 10_000;

function Slider(props: { points: VolumePoint[]; at: number; from: number; until: number; set: (at: number) => void }) {
  const { points, at, from, until } = props;
  const found = pointAsOf(points, at);
  const place = (at - from) / Math.max(1, until - from);
  return (
    <div class="travel">
      <svg viewBox="0 0 1000 22" preserveAspectRatio="none" aria-hidden="true">
        {marks(points, from, until).map((mark, index) => <rect key={points[index]!.number} class={points[index] === found ? "here" : ""} x={mark * 1000 - 1.5} width="3" height="22" />)}
        <line x1={place * 1000} x2={place * 1000} y1="0" y2="22" />
      </svg>
      <input type="range" min={0} max={STEPS} value={Math.round(place * STEPS)} aria-label="as of" aria-valuetext={`as of ${moment(at)}: ${found ? `point ${found.number}` : "no point"}`}
        onInput={(event) => props.set(from + ((until - from) * Number(event.currentTarget.value)) / STEPS)} />
      <div class="line small soft"><span>{moment(from)}</span><span class="grow" /><span>now</span></div>
    </div>
  );
}

/** A new guest whose disk starts from the point: looked at first. */
function Clone(props: { volume: Volume; guest: Guest; point: VolumePoint; close: () => void }) {
  const { volume, guest, point } = props;
  const [name, setName] = useState(`${guest.name}-then`);
  const [place, setPlace] = useState("");
  const [trial, setTrial] = useState<Operation>();
  const { isWorking, problem, attempt } = useAttempt();
  const port = [...ports.value.values()].find((one) => one.guest === guest.id);
  const [network, setNetwork] = useState(port?.network ?? "");
  const wanted = (): Partial<GuestCreate> => ({
    name, project: volume.project, image: guest.image, shape: guest.shape, network,
    disk_from: { volume: volume.id, point: point.number },
    ...(place ? { place } : {}),
  });
  const set = (put: (value: string) => void) => (value: string) => { put(value); setTrial(undefined); };
  const rehearse = () => attempt(async () => setTrial(await change<Operation>("POST", "/v1/guests?dry_run=true", wanted())));
  const carryOut = () => attempt(async () => {
    const operation = await change<Operation>("POST", "/v1/guests", wanted());
    if (!operation) return;
    learn(operation);
    props.close();
    go(`/operations/${operation.id}`);
  });
  const checks = trial?.plan?.checks ?? [];
  const isFit = trial !== undefined && checks.every((check) => check.is_ok);
  return (
    <Dialog title={`A new guest from point ${point.number} of ${volume.name}`} close={props.close} submit={() => void (isFit ? carryOut() : rehearse())}>
      <p>Its disk is what {volume.name} was at {moment(point.at_ms)}, copy-on-write: no byte is copied. {guest.name} is left alone. It boots as after a power cut at that moment.</p>
      <label>Name <input required maxLength={63} value={name} onInput={(event) => set(setName)(event.currentTarget.value)} /></label>
      <label>Network
        <select required value={network} onChange={(event) => set(setNetwork)(event.currentTarget.value)}>
          <option value="">choose a network</option>
          {[...networks.value.values()].filter((one) => one.project === volume.project).map((one) => <option key={one.id} value={one.id}>{one.name}</option>)}
        </select>
      </label>
      <label>Where to start it
        <select value={place} onChange={(event) => set(setPlace)(event.currentTarget.value)}>
          <option value="">anywhere with room</option>
          <optgroup label="Clouds">{[...clouds.value.values()].map((one) => <option key={one.id} value={one.id}>{one.name}{one.id === point.cloud ? " (where the point lies)" : ""}</option>)}</optgroup>
          <optgroup label="Hosts">{[...hosts.value.values()].filter((one) => one.state === "up").map((one) => <option key={one.id} value={one.id}>{one.name} in {one.cloud_name}</option>)}</optgroup>
        </select>
      </label>
      {trial && (
        <div class="checks" role="status">
          {checks.map((check) => <p key={check.name} class={check.is_ok ? "good" : "bad"}>{check.is_ok ? "✓" : "✗"} {check.name.replaceAll("_", " ")}: {check.detail}</p>)}
          {trial.plan?.destination_name && <p>It would start on <b>{trial.plan.destination_name}</b>.</p>}
          {checks.length === 0 && <p class="good">✓ it can be done now</p>}
        </div>
      )}
      {problem && <p class="bad" role="alert">{problem}</p>}
      <div class="line">
        <button type="button" onClick={props.close}>Close</button>
        <span class="grow" />
        {isFit ? <button class="main" disabled={isWorking}>Make it</button> : <button class="main" disabled={isWorking || !network}>Look first</button>}
      </div>
    </Dialog>
  );
}

/** How points are taken and kept; what would go by it is said before. */
function Policy(props: { volume: Volume; history: VolumeHistory | undefined; close: () => void; done: () => void }) {
  const { volume, history } = props;
  const [every, setEvery] = useState(history ? everyText(history.policy.every_s) : "15m");
  const [keep, setKeep] = useState(history ? bandsText(history.policy.keep) : "4h:15m 2d:1h 30d:1d");
  const [memory, setMemory] = useState(history?.policy.memory ?? 0);
  const [trial, setTrial] = useState<VolumeHistory>();
  const { isWorking, problem, attempt } = useAttempt();
  const every_s = every.trim() === "" ? null : seconds(every);
  const found = bands(keep);
  const isReady = found !== null && (every.trim() === "" || every_s !== null);
  const wanted = (): HistoryPolicy => ({ every_s, keep: found ?? [], ...(memory > 0 ? { memory } : {}) });
  const path = `/v1/volumes/${volume.id}/history`;
  const rehearse = () => attempt(async () => setTrial(await change<VolumeHistory>("PUT", `${path}?dry_run=true`, wanted())));
  const carryOut = () => attempt(async () => {
    await change("PUT", path, wanted());
    props.done();
    props.close();
  });
  const goes = trial && history ? history.points.length - trial.points.length : 0;
  return (
    <Dialog title={`Points of ${volume.name}`} close={props.close} submit={() => void (trial ? carryOut() : rehearse())}>
      <label>One every (15m, 1h; empty: only when asked for) <input value={every} onInput={(event) => { setEvery(event.currentTarget.value); setTrial(undefined); }} /></label>
      <label>Kept (age:gap, the youngest first) <input required value={keep} onInput={(event) => { setKeep(event.currentTarget.value); setTrial(undefined); }} /></label>
      <label>With the guest's memory (checkpoints, from which it can go on)
        <select value={memory > 0 ? "yes" : "no"} onChange={(event) => { setMemory(event.currentTarget.value === "yes" ? history?.policy.memory ?? 2 : 0); setTrial(undefined); }}>
          <option value="no">no, the disk only</option>
          <option value="yes">yes, of the newest {memory > 0 ? memory : history?.policy.memory ?? 2}</option>
        </select>
      </label>
      {!isReady && <p class="warn" role="status">Times are like 90s, 15m, 4h, 2d; bands like 4h:15m 2d:1h.</p>}
      {trial && <p class="checks" role="status">{goes > 0 ? `${goes} of ${history?.points.length} points would go at once.` : "No point would go."}</p>}
      {problem && <p class="bad" role="alert">{problem}</p>}
      <div class="line">
        <button type="button" onClick={props.close}>Close</button>
        <span class="grow" />
        <button class="main" disabled={isWorking || !isReady}>{trial ? "Keep them so" : "Look first"}</button>
      </div>
    </Dialog>
  );
}

/** Whether it is what was written, worked out here and not believed. */
function Whole(props: { history: VolumeHistory }) {
  const { points, thinned, fault } = useMemo(() => verifyPoints(props.history), [props.history]);
  if (fault) return <p class="bad" role="alert">The history is not what was written: {fault}.</p>;
  return <p class="good small" role="status">✓ {points} {points === 1 ? "point has" : "points have"} the hash of what is told of {points === 1 ? "it" : "them"} and of the one before{thinned > 0 ? `; ${thinned} thinned out are accounted for` : ""}.</p>;
}

export function Travel(props: { volume: Volume; guest: Guest | undefined; history: Answer<VolumeHistory> }) {
  const { volume, guest } = props;
  const history = props.history.value;
  const [chosen, setChosen] = useState<number>();
  const [asked, setAsked] = useState<"policy" | "end">();
  // The point when its button was pressed: the newest changes while the dialog is open, what is made of one does not.
  const [source, setSource] = useState<VolumePoint>();
  const [said, setSaid] = useState("");
  const { isWorking, problem, attempt } = useAttempt();
  const mayChange = may(who.value, "change");
  const points = history?.points ?? [];
  const [from, until] = [points[0]?.at_ms ?? 0, now.value];
  const at = Math.min(until, Math.max(from, chosen ?? until));
  const found = pointAsOf(points, at);
  const index = found ? points.indexOf(found) : -1;
  const go_to = (point: VolumePoint | undefined) => point && setChosen(point.at_ms);
  const take = () => attempt(async () => {
    await change("POST", `/v1/volumes/${volume.id}/points`);
    setSaid("A point is being taken; it is shown here when it is.");
  });
  return (
    <Panel title="Time travel" wide aside={mayChange ? (
      <span class="line">
        {history && <button disabled={isWorking} onClick={() => void take()}>Take a point now</button>}
        <button onClick={() => setAsked("policy")}>{history ? "How they are kept…" : "Keep points…"}</button>
        {history && <button onClick={() => setAsked("end")}>End…</button>}
      </span>
    ) : undefined}>
      {problem && <p class="bad" role="alert">{problem}</p>}
      {said && <p role="status" class="small">{said}</p>}
      {history?.problem && <p class="warn" role="alert">The last point that was due was not taken: {history.problem}</p>}
      {!history && (props.history.isNone ? <Empty>No points are kept of this volume.</Empty> : props.history.problem ? <p class="bad" role="alert">{props.history.problem}</p> : <Empty>…</Empty>)}
      {history && points.length === 0 && <Empty>No point yet{history.policy.every_s ? `; one is taken every ${duration(history.policy.every_s * 1000)} while its guest runs` : ""}.</Empty>}
      {history && found && (
        <>
          <Slider points={points} at={at} from={from} until={until} set={setChosen} />
          <div class="line">
            <button disabled={index <= 0} onClick={() => go_to(points[index - 1])}>← earlier point</button>
            <button disabled={index < 0 || index >= points.length - 1} onClick={() => go_to(points[index + 1])}>later point →</button>
            <span class="grow" />
            {mayChange && guest && <button class="main" onClick={() => setSource(found)}>New guest from point {found.number}…</button>}
          </div>
          <Facts rows={[
            ["as of", moment(at)],
            ["that is", `point ${found.number}, ${moment(found.at_ms)}`],
            ["older than the instant by", duration(at - found.at_ms)],
            ["its age", ago(found.at_ms, now.value)],
            ["stored for it", bytes(found.stored_bytes)],
            ["lies in", cloudName(found.cloud)],
            ["written under", `epoch ${found.epoch}, version ${found.version}`],
            ...(found.memory ? [["the guest's memory", found.memory.is_kept ? `${bytes(found.memory.bytes)}: it is a checkpoint` : "not kept any more"] as [string, string]] : []),
            ["content", <code>{found.root.slice(0, 16)}…</code>],
          ]} />
          <details>
            <summary>{points.length} points, {bytes(stored(history))} stored for them; {history.thinned.reduce((sum, row) => sum + row.to - row.from + 1, 0)} thinned out</summary>
            <Grid name="points" items={points.map((point) => ({ ...point, id: String(point.number) })).reverse()} empty="" columns={[
              { title: "point", show: (point) => <button class="plain" onClick={() => setChosen(point.at_ms)}>{point.number}</button> },
              { title: "at", show: (point) => moment(point.at_ms) },
              { title: "stored", show: (point) => bytes(point.stored_bytes) },
              { title: "in", show: (point) => cloudName(point.cloud), wide: true },
              { title: "version", show: (point) => point.version, wide: true },
              { title: "hash", show: (point) => <code>{point.hash.slice(0, 16)}…</code>, wide: true },
            ]} />
          </details>
          <p class="small soft">Kept {bandsText(history.policy.keep)}. <code>supercloud volume history {volume.name} --verify --noted HASH</code> checks it against a hash that you noted once.</p>
          <Whole history={history} />
        </>
      )}
      {source && guest && <Clone volume={volume} guest={guest} point={source} close={() => setSource(undefined)} />}
      {asked === "policy" && <Policy volume={volume} history={history} close={() => setAsked(undefined)} done={props.history.again} />}
      {asked === "end" && (
        <Sure title={`End the history of ${volume.name}`} verb="Give all points up" close={() => setAsked(undefined)} ask={{ method: "DELETE", path: `/v1/volumes/${volume.id}/history` }} done={() => props.history.again()}>
          <p>All {points.length} points go. Guests that were made from them stay. Image {images.value.get(volume.image ?? "")?.name ?? "and volume"} is left alone.</p>
        </Sure>
      )}
    </Panel>
  );
}

export const guestOf = (volume: Volume): Guest | undefined => (volume.guest ? guests.value.get(volume.guest) : undefined);
