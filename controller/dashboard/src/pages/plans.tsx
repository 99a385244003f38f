// Plans: moves of many guests, decided together, looked at before they are made, and taken back.
import { useState } from "preact/hooks";
import type { FleetPlan } from "../api/types";
import { may } from "../store/derive";
import { offers, tally, title } from "../store/plans";
import { clouds, hosts, learnPlan, now, plans, seesAll, who } from "../store/store";
import { Sure } from "../ui/dialog";
import { ago, bytes, duration, moment } from "../ui/format";
import { Empty, Facts, Grid, Panel } from "../ui/parts";
import { PlanBody, PlanMark } from "../ui/plan";
import { PlanButton } from "../ui/plan_ask";

export const planName = (plan: FleetPlan) => title(plan, hosts.value, clouds.value);

export function Plans() {
  if (!seesAll()) return <Panel title="Plans" wide><Empty>Plans are about all projects: a token of one project does not see them.</Empty></Panel>;
  const found = [...plans.value.values()].sort((a, b) => b.created_at_ms - a.created_at_ms);
  return (
    <Panel title={`Plans (${found.length})`} wide aside={<PlanButton aim={{}} text="New plan…" />}>
      <Grid name="plans" tall items={found} empty={<>No plan yet: <code>supercloud plan create drain HOST</code></>} columns={[
        { title: "what", show: (plan) => <a href={`#/plans/${plan.id}`}>{planName(plan)}</a> },
        { title: "state", key: (plan) => plan.state, show: (plan) => <PlanMark of={plan.state} /> },
        { title: "moves", key: (plan) => plan.cost.moves, show: (plan) => plan.cost.moves },
        { title: "steps", show: (plan) => tally(plan.steps).map(([state, count]) => `${count} ${state.replaceAll("_", " ")}`).join(", ") || "–", wide: true },
        { title: "bytes", key: (plan) => plan.cost.bytes, show: (plan) => bytes(plan.cost.bytes), wide: true },
        { title: "made", key: (plan) => plan.created_at_ms, show: (plan) => ago(plan.created_at_ms, now.value) },
        { title: "by", key: (plan) => plan.actor, show: (plan) => plan.actor, wide: true },
        { title: "why", show: (plan) => plan.reason ?? "–", wide: true },
      ]} />
    </Panel>
  );
}

type Verb = "apply" | "cancel" | "undo";
const VERBS: Record<Verb, { title: string; says: (plan: FleetPlan) => string }> = {
  apply: {
    title: "Apply",
    says: (plan) => `${plan.cost.moves === 1 ? "One guest moves" : `${plan.cost.moves} guests move`}${plan.cost.longest_downtime_ms ? `, each with a pause of ${duration(plan.cost.longest_downtime_ms)} or less, as far as was measured` : ""}${plan.cordons.length > 0 ? `; ${plan.cordons.map((one) => one.host_name).join(", ")} takes no new guests` : ""}. Each move is checked again when its turn comes.`,
  },
  cancel: { title: "Cancel", says: (plan) => (plan.state === "proposed" ? "Nothing has begun; nothing will." : "No step begins any more, those under way are cancelled where that is still possible, and what is done stays.") },
  undo: { title: "Take back", says: () => "Its cordons are lifted, and every guest that it moved goes back to where it was, the last first." },
};

/** What may be asked of a plan now, by who may ask. */
export function Turn(props: { plan: FleetPlan }) {
  const { plan } = props;
  const [verb, setVerb] = useState<Verb>();
  if (!may(who.value, "system")) return null;
  return (
    <>
      {offers(plan).map((one) => <button key={one} class={one === "apply" ? "main" : ""} onClick={() => setVerb(one)}>{VERBS[one].title}…</button>)}
      {verb && (
        <Sure title={`${VERBS[verb].title}: ${planName(plan)}`} verb={`${VERBS[verb].title} now`} close={() => setVerb(undefined)} ask={{ method: "POST", path: `/v1/plans/${plan.id}/${verb}` }}
          done={(told: FleetPlan | undefined) => { if (told) learnPlan(told); }}>
          <p>{VERBS[verb].says(plan)}</p>
        </Sure>
      )}
    </>
  );
}

export function PlanPage(props: { id: string }) {
  const plan = plans.value.get(props.id);
  if (!plan) return <Panel title="No such plan" wide><Empty>There is no plan {props.id} any more, or this token does not see it.</Empty></Panel>;
  return (
    <div class="tiles">
      <Panel title={planName(plan)} wide aside={<span class="line"><PlanMark of={plan.state} /><Turn plan={plan} /></span>}>
        <Facts rows={[
          ["made", moment(plan.created_at_ms)],
          ["by", plan.actor],
          ["why", plan.reason ?? "–"],
          ...(plan.ended_at_ms ? [["came to rest", moment(plan.ended_at_ms)] as [string, string]] : []),
          ["request", <code>{plan.request_id}</code>],
        ]} />
      </Panel>
      <Panel title="What it does" wide><PlanBody plan={plan} /></Panel>
    </div>
  );
}
