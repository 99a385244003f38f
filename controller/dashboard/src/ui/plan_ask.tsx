// Asking for a plan: looked at as a dry run first, then kept, and applied from its own page.
import { useState } from "preact/hooks";
import { change } from "../api/http";
import type { FleetPlan, FleetPlanCreate, PlanKind } from "../api/types";
import { go } from "../router";
import { may } from "../store/derive";
import { KINDS } from "../store/plans";
import { clouds, guests, hosts, learnPlan, who } from "../store/store";
import { Dialog, useAttempt } from "./dialog";
import { PlanBody } from "./plan";

const SAYS: Record<PlanKind, string> = {
  drain: "Everything leaves the host, which takes no new guests from then on.",
  evacuate: "Everything leaves the cloud, whose hosts take no new guests from then on.",
  rebalance: "Guests go from loaded hosts to less loaded ones.",
  gather: "The chosen guests go to one place: all of them, or none.",
};
/** As many as the controller takes. */
const MOST_GATHERED = 200;
const SHOWN = 12;

function Gathered(props: { chosen: string[]; choose: (chosen: string[]) => void }) {
  const [filter, setFilter] = useState("");
  const low = filter.toLowerCase();
  const running = [...guests.value.values()].filter((guest) => guest.state === "running" && !props.chosen.includes(guest.id));
  const found = running.filter((guest) => `${guest.name} ${guest.host_name ?? ""} ${guest.cloud_name ?? ""}`.toLowerCase().includes(low)).slice(0, SHOWN);
  return (
    <fieldset>
      <legend>Guests ({props.chosen.length})</legend>
      <div class="line">{props.chosen.map((id) => <button type="button" key={id} title="leave it out" onClick={() => props.choose(props.chosen.filter((one) => one !== id))}>{guests.value.get(id)?.name ?? id} ✕</button>)}</div>
      <input type="search" aria-label="find guests" placeholder="find guests that run" value={filter} onInput={(event) => setFilter(event.currentTarget.value)} />
      <div class="line">
        {found.map((guest) => <button type="button" key={guest.id} disabled={props.chosen.length >= MOST_GATHERED} onClick={() => props.choose([...props.chosen, guest.id])}>+ {guest.name} <small>{guest.host_name}</small></button>)}
        {found.length === 0 && <small>no running guest matches</small>}
        {running.length > SHOWN && found.length === SHOWN && <small>and more: type a part of the name</small>}
      </div>
    </fieldset>
  );
}

/** What is asked for is known, or chosen here. */
export interface Aim { kind?: PlanKind; host?: string; cloud?: string; name?: string }

function Ask(props: { aim: Aim; close: () => void }) {
  const { aim } = props;
  const [kind, setKind] = useState<PlanKind>(aim.kind ?? "rebalance");
  const [host, setHost] = useState(aim.host ?? "");
  const [cloud, setCloud] = useState(aim.cloud ?? "");
  const [to, setTo] = useState("");
  const [chosen, setChosen] = useState<string[]>([]);
  const [band, setBand] = useState("20");
  const [reason, setReason] = useState("");
  const [look, setLook] = useState<FleetPlan>();
  const { isWorking, problem, attempt } = useAttempt();
  // What was looked at is what is asked for, or is looked at anew.
  const set = <T,>(put: (value: T) => void) => (value: T) => { put(value); setLook(undefined); };
  const wanted = (): FleetPlanCreate => ({
    kind,
    ...(kind === "drain" ? { host } : {}),
    ...(kind === "evacuate" ? { cloud } : {}),
    ...(kind === "gather" ? { guests: chosen, to } : {}),
    ...(kind === "rebalance" ? { band_percent: Number(band) } : {}),
    ...(reason.trim() ? { reason: reason.trim() } : {}),
  });
  const isReady = { drain: host, evacuate: cloud, gather: to && chosen.length > 0, rebalance: true }[kind];
  const rehearse = () => attempt(async () => setLook(await change<FleetPlan>("POST", "/v1/plans?dry_run=true", wanted())));
  const keep = () => attempt(async () => {
    const plan = await change<FleetPlan>("POST", "/v1/plans", wanted());
    if (!plan) return;
    learnPlan(plan);
    props.close();
    go(`/plans/${plan.id}`);
  });
  const isUseful = look && (look.steps.length > 0 || look.cordons.length > 0);
  const places = (
    <>
      <optgroup label="Clouds">{[...clouds.value.values()].map((one) => <option key={one.id} value={one.id}>{one.name}</option>)}</optgroup>
      <optgroup label="Hosts">{[...hosts.value.values()].filter((one) => one.state === "up").map((one) => <option key={one.id} value={one.id}>{one.name} in {one.cloud_name}</option>)}</optgroup>
    </>
  );
  return (
    <Dialog title={aim.kind ? `${KINDS[aim.kind]} ${aim.name ?? ""}` : "New plan"} wide close={props.close} submit={() => void (isUseful ? keep() : rehearse())}>
      {!aim.kind && (
        <label>What for
          <select value={kind} onChange={(event) => set(setKind)(event.currentTarget.value as PlanKind)}>{Object.entries(KINDS).map(([one, text]) => <option key={one} value={one}>{text}</option>)}</select>
        </label>
      )}
      <p>{SAYS[kind]} Nothing moves before the plan is applied.</p>
      {kind === "drain" && !aim.host && (
        <label>Host
          <select value={host} required onChange={(event) => set(setHost)(event.currentTarget.value)}>
            <option value="">choose a host</option>
            {[...hosts.value.values()].filter((one) => one.state !== "removed").map((one) => <option key={one.id} value={one.id}>{one.name} in {one.cloud_name}</option>)}
          </select>
        </label>
      )}
      {kind === "evacuate" && !aim.cloud && (
        <label>Cloud
          <select value={cloud} required onChange={(event) => set(setCloud)(event.currentTarget.value)}>
            <option value="">choose a cloud</option>
            {[...clouds.value.values()].map((one) => <option key={one.id} value={one.id}>{one.name}</option>)}
          </select>
        </label>
      )}
      {kind === "rebalance" && <label>Hosts may be this far apart, in percent of a host <input type="number" min={1} max={100} required value={band} onInput={(event) => set(setBand)(event.currentTarget.value)} /></label>}
      {kind === "gather" && (
        <>
          <Gathered chosen={chosen} choose={set(setChosen)} />
          <label>Where to <select value={to} required onChange={(event) => set(setTo)(event.currentTarget.value)}><option value="">choose a cloud or a host</option>{places}</select></label>
        </>
      )}
      <label>Why (for the audit trail) <input value={reason} maxLength={200} onInput={(event) => setReason(event.currentTarget.value)} /></label>
      {look && <div class="checks look" role="status"><PlanBody plan={look} /></div>}
      {problem && <p class="bad" role="alert">{problem}</p>}
      <div class="line">
        <button type="button" onClick={props.close}>Close</button>
        <span class="grow" />
        {isUseful ? <button class="main" disabled={isWorking}>Keep this plan</button> : <button class="main" disabled={isWorking || !isReady}>Look first</button>}
      </div>
    </Dialog>
  );
}

/** A button for who may make plans; opens the question. */
export function PlanButton(props: { aim: Aim; text: string }) {
  const [isOpen, setOpen] = useState(false);
  if (!may(who.value, "system")) return null;
  return (
    <>
      <button onClick={() => setOpen(true)}>{props.text}</button>
      {isOpen && <Ask aim={props.aim} close={() => setOpen(false)} />}
    </>
  );
}
