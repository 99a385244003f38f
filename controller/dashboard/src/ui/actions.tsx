// Actions on a guest: each is asked for as a dry run first, whose checks are shown before anything is done.
import { useState } from "preact/hooks";
import { Refused, change } from "../api/http";
import type { Guest, MemoryMode, Operation } from "../api/types";
import { go } from "../router";
import { may, mayCancel } from "../store/derive";
import { clouds, hosts, learn, who } from "../store/store";
import { Dialog, Sure, useAttempt } from "./dialog";
import { bytes, duration } from "./format";

type Verb = "migrate" | "mirror" | "freeze" | "thaw" | "start" | "stop";

interface Choice { verb: Verb; title: string; places: boolean; says: string; path?: string }

const CHOICES: Record<Verb, Choice> = {
  migrate: { verb: "migrate", title: "Migrate", places: true, says: "It goes on running while it moves; its peers see a pause of less than a second or so." },
  mirror: { verb: "mirror", title: "Mirror", places: true, path: "mirrors", says: "A second copy of it stands by at another host, kept by cuts, and can take over when the guest's own host is lost." },
  freeze: { verb: "freeze", title: "Freeze", places: false, says: "Its memory and disks go into the image store; it stands still until it is thawed, anywhere." },
  thaw: { verb: "thaw", title: "Thaw", places: true, says: "It goes on where it was frozen, at the place you choose: at once where the host can do that, and its memory follows out of the store." },
  start: { verb: "start", title: "Start", places: true, says: "It boots from its volumes." },
  stop: { verb: "stop", title: "Stop", places: false, says: "It is asked to shut down; after 30 s its plug is pulled." },
};

function offered(guest: Guest): Verb[] {
  if (guest.operation) return [];
  switch (guest.state) {
    case "running": return ["migrate", "mirror", "freeze", "stop"];
    case "frozen": return ["thaw"];
    default: return ["start"];
  }
}

function allowed(verb: Verb): boolean {
  return may(who.value, verb === "start" || verb === "stop" || verb === "mirror" ? "change" : "move");
}

export function GuestActions(props: { guest: Guest }) {
  const [verb, setVerb] = useState<Verb>();
  const verbs = offered(props.guest).filter(allowed);
  return (
    <>
      {verbs.map((one) => <button key={one} onClick={() => setVerb(one)}>{CHOICES[one].title}…</button>)}
      {verb && <Ask guest={props.guest} choice={CHOICES[verb]} close={() => setVerb(undefined)} />}
    </>
  );
}

const takesReason = (verb: Verb): boolean => verb === "migrate" || verb === "freeze" || verb === "mirror";

interface Cuts { seconds: string; mode: "async" | "strict"; keep: boolean; lease: string }

const MEMORY: Record<MemoryMode, string> = {
  pre_copy: "goes first; the guest follows when little is left",
  hybrid: "goes first; what it still writes then follows it",
  post_copy: "follows the guest, which leaves at once: should the host that it left die meanwhile, the guest is lost",
};

function body(choice: Choice, place: string, reason: string, cuts: Cuts, memory: MemoryMode): Record<string, unknown> {
  const why = reason.trim() && takesReason(choice.verb) ? { reason: reason.trim() } : {};
  if (choice.verb === "mirror") return { to: place, interval_ms: Math.round(Number(cuts.seconds) * 1000), mode: cuts.mode, keep: cuts.keep, ...(cuts.lease ? { fencing: "lease", lease_ms: Math.round(Number(cuts.lease) * 1000) } : {}), ...why };
  if (choice.verb === "migrate") return { to: place, memory, ...why };
  if (choice.verb === "thaw") return place ? { to: place } : {};
  if (choice.verb === "start") return place ? { place } : {};
  return why;
}

function Ask(props: { guest: Guest; choice: Choice; close: () => void }) {
  const { guest, choice } = props;
  const [place, setPlace] = useState("");
  const [reason, setReason] = useState("");
  const [trial, setTrial] = useState<Operation>();
  const { isWorking, problem, attempt } = useAttempt();
  const [cuts, setCuts] = useState<Cuts>({ seconds: "1", mode: "async", keep: false, lease: "" });
  const [memory, setMemory] = useState<MemoryMode>("pre_copy");
  const needsPlace = choice.verb === "migrate" || choice.verb === "mirror";
  const path = `/v1/guests/${guest.id}/${choice.path ?? choice.verb}`;
  const rehearse = () => attempt(async () => setTrial(await change<Operation>("POST", `${path}?dry_run=true`, body(choice, place, reason, cuts, memory))));
  const carryOut = () => attempt(async () => {
    const operation = await change<Operation>("POST", path, body(choice, place, reason, cuts, memory));
    if (operation) {
      learn(operation);
      props.close();
      go(`/operations/${operation.id}`);
    }
  });
  const plan = trial?.plan;
  const isFit = trial !== undefined && (plan?.checks ?? []).every((check) => check.is_ok);
  return (
    <Dialog title={`${choice.title} ${guest.name}`} close={props.close} submit={() => void (isFit ? carryOut() : rehearse())}>
      <p>{choice.says}</p>
      {choice.places && (
        <label>Where to
          <select value={place} required={needsPlace} onChange={(event) => { setPlace(event.currentTarget.value); setTrial(undefined); }}>
            <option value="">{needsPlace ? "choose a cloud or a host" : "anywhere with room"}</option>
            <optgroup label="Clouds">
              {[...clouds.value.values()].map((cloud) => <option key={cloud.id} value={cloud.id}>{cloud.name}{cloud.id === guest.cloud ? " (where it is)" : ""}</option>)}
            </optgroup>
            <optgroup label="Hosts">
              {[...hosts.value.values()].filter((host) => host.state === "up").map((host) => <option key={host.id} value={host.id}>{host.name} in {host.cloud_name}{host.id === guest.host ? " (where it is)" : ""}</option>)}
            </optgroup>
          </select>
        </label>
      )}
      {choice.verb === "migrate" && (
        <label>Its memory
          <select value={memory} onChange={(event) => { setMemory(event.currentTarget.value as MemoryMode); setTrial(undefined); }}>
            {Object.entries(MEMORY).map(([mode, says]) => <option key={mode} value={mode}>{says}</option>)}
          </select>
        </label>
      )}
      {choice.verb === "mirror" && (
        <>
          <label>A cut every so many seconds
            <input type="number" min={0.05} max={600} step="any" required value={cuts.seconds} onInput={(event) => { setCuts({ ...cuts, seconds: event.currentTarget.value }); setTrial(undefined); }} />
          </label>
          <label>What it says to the network
            <select value={cuts.mode} onChange={(event) => { setCuts({ ...cuts, mode: event.currentTarget.value as Cuts["mode"] }); setTrial(undefined); }}>
              <option value="async">goes out at once: taking over loses what it did since the last cut</option>
              <option value="strict">waits for the standby: nothing that anybody has seen is lost</option>
            </select>
          </label>
          <label>Who says that its host is dead
            <select value={cuts.lease === "" ? "manual" : "lease"} onChange={(event) => { setCuts({ ...cuts, lease: event.currentTarget.value === "lease" ? "15" : "" }); setTrial(undefined); }}>
              <option value="manual">an operator, or the host's provider</option>
              <option value="lease">the clock: it stands still when nobody lets it run, and its standby takes over</option>
            </select>
          </label>
          {cuts.lease !== "" && (
            <label>It may run unheard for so many seconds (longer than the controller is ever away)
              <input type="number" min={5} max={300} step="any" required value={cuts.lease} onInput={(event) => { setCuts({ ...cuts, lease: event.currentTarget.value || "5" }); setTrial(undefined); }} />
            </label>
          )}
          <label class="inline"><input type="checkbox" checked={cuts.keep} onChange={(event) => { setCuts({ ...cuts, keep: event.currentTarget.checked }); setTrial(undefined); }} /> begin another one, elsewhere if need be, whenever it has taken over or has broken</label>
        </>
      )}
      {takesReason(choice.verb) && (
        <label>Why (for the audit trail)
          <input value={reason} maxLength={200} onInput={(event) => setReason(event.currentTarget.value)} />
        </label>
      )}
      {trial && (
        <div class="checks" role="status">
          {(plan?.checks ?? []).map((check) => <p key={check.name} class={check.is_ok ? "good" : "bad"}>{check.is_ok ? "✓" : "✗"} {check.name.replaceAll("_", " ")}: {check.detail}</p>)}
          {plan?.destination_name && <p>It would go to <b>{plan.destination_name}</b>{plan.predicted_bytes ? `, about ${bytes(plan.predicted_bytes)}` : ""}{plan.predicted_ms ? ` in ${duration(plan.predicted_ms)}` : ""}{plan.predicted_downtime_ms ? `, standing still for ${duration(plan.predicted_downtime_ms)}` : ""}.{plan.predicted_from && <small class="soft"> {plan.predicted_from}.</small>}</p>}
          {!plan && <p class="good">✓ it can be done now</p>}
        </div>
      )}
      {problem && <p class="bad" role="alert">{problem}</p>}
      <div class="line">
        <button type="button" onClick={props.close}>Close</button>
        <span class="grow" />
        {!isFit && <button class="main" disabled={isWorking || (needsPlace && !place)}>Check first</button>}
        {isFit && <button class="main" disabled={isWorking}>{choice.title} now</button>}
      </div>
    </Dialog>
  );
}

export function Cancel(props: { operation: Operation }) {
  const { operation } = props;
  const [problem, setProblem] = useState("");
  const [isOpen, setOpen] = useState(false);
  const early = ["plan", "prepare", "copy"].includes(operation.phase);
  if (!early || !mayCancel(who.value, operation.kind)) return null;
  if (operation.is_cancel_requested) return <small>cancelling…</small>;
  const cancel = async () => {
    try {
      const told = await change<Operation>("POST", `/v1/operations/${operation.id}/cancel`);
      if (told) learn(told);
    } catch (error) {
      setProblem(error instanceof Refused ? error.problem.detail : String(error));
    }
  };
  if (operation.kind === "guest_mirror") {
    return (
      <>
        <button onClick={() => setOpen(true)}>End the mirror…</button>
        {isOpen && (
          <Sure title="End the mirror" verb="End it" close={() => setOpen(false)} ask={{ method: "POST", path: `/v1/operations/${operation.id}/cancel` }} done={(told: Operation | undefined) => { if (told) learn(told); }}>
            <p>The guest runs on where it is. Nothing of it is kept elsewhere any more, and no mirror is begun again.</p>
          </Sure>
        )}
      </>
    );
  }
  return <>{problem && <small class="bad" role="alert">{problem}</small>}<button onClick={() => void cancel()}>Cancel</button></>;
}
