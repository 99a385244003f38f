// A plan as people look at it before it is applied, while it is carried out, and after.
import type { FleetPlan } from "../api/types";
import { isAtRest, loads, tally } from "../store/plans";
import { guests, hosts, now } from "../store/store";
import { ago, bytes, duration, money } from "./format";
import { Empty, Facts, Grid, HostLink, State } from "./parts";

/** A plan that runs is not well because of that: it is busy. */
export function PlanMark(props: { of: string }) {
  return props.of === "running" ? <span class="state busy">under way</span> : <State of={props.of} />;
}

function Level(props: { name: string; part: number; warn?: boolean }) {
  const text = `${props.name}: ${Math.round(props.part * 100)} % of its memory`;
  return (
    <span class={`level${props.part > 1 ? " over" : ""}`} title={text}>
      <svg viewBox="0 0 100 8" preserveAspectRatio="none" role="img" aria-label={text}><rect width={Math.min(1, props.part) * 100} height="8" /></svg>
      <small>{Math.round(props.part * 100)} %</small>
    </span>
  );
}

/** How full the hosts are now and will be then. */
function BeforeAfter(props: { plan: FleetPlan }) {
  const found = loads(props.plan, hosts.value, guests.value);
  if (found.length === 0) return null;
  return (
    <>
      <h3>Hosts now, and when its steps are made</h3>
      <Grid name="hosts before and after" items={found} empty="" columns={[
        { title: "host", key: (one) => one.name, show: (one) => <HostLink id={one.id} /> },
        { title: "cloud", key: (one) => one.cloud, show: (one) => one.cloud, wide: true },
        { title: "guests", key: (one) => one.guestsThen, show: (one) => (one.guestsNow === one.guestsThen ? one.guestsNow : <>{one.guestsNow} → <b>{one.guestsThen}</b></>) },
        { title: "memory now", key: (one) => one.memoryNow, show: (one) => <Level name="now" part={one.memoryNow} /> },
        { title: "then", key: (one) => one.memoryThen, show: (one) => <Level name="then" part={one.memoryThen} /> },
      ]} />
    </>
  );
}

const unknown = "not known";
const known = (value: number | null | undefined, text: (value: number) => string): string => (value === null || value === undefined ? unknown : text(value));

export function PlanBody(props: { plan: FleetPlan }) {
  const { plan } = props;
  const steps = plan.steps.map((step) => ({ ...step, id: step.guest }));
  const made = tally(plan.steps);
  return (
    <>
      <Facts rows={[
        ["moves", String(plan.cost.moves)],
        ["bytes, at least", bytes(plan.cost.bytes)],
        ["providers ask for them", known(plan.cost.egress_nanousd, money)],
        ["takes about", known(plan.cost.predicted_ms, duration)],
        ["longest pause", known(plan.cost.longest_downtime_ms, duration)],
      ]} />
      {plan.cordons.length > 0 && <p>Takes no new guests {isAtRest(plan.state) && plan.state !== "proposed" ? "because of it" : "from then on"}: {plan.cordons.map((cordon, at) => <>{at > 0 && ", "}<b>{cordon.host_name}</b>{cordon.state !== "pending" && ` (${cordon.state.replaceAll("_", " ")})`}</>)}</p>}
      {plan.is_all_or_none && <p class="soft">All of them or none: when one step fails, those that are done are taken back.</p>}
      {plan.risks.length > 0 && <ul class="alarms" aria-label="risks">{plan.risks.map((risk) => <li key={risk}>{risk}</li>)}</ul>}
      {plan.stuck.length > 0 && (
        <ul class="alarms" aria-label="guests that stay">
          {plan.stuck.map((one) => <li key={one.guest} class="bad"><a href={`#/guests/${one.guest}`}>{one.guest_name}</a> stays on {one.host_name}: {one.reason}</li>)}
        </ul>
      )}
      <BeforeAfter plan={plan} />
      {plan.steps.some((step) => step.error) && (
        <ul class="alarms" aria-label="steps with trouble">
          {plan.steps.map((step) => step.error && <li key={step.guest} class={step.state === "failed" || step.state === "not_undone" ? "bad" : ""}><a href={`#/guests/${step.guest}`}>{step.guest_name}</a> {step.waiting_since_ms ? "waits: " : ""}{step.error.detail}</li>)}
        </ul>
      )}
      {steps.length === 0 ? <Empty>No guest has to move.</Empty> : (
        <>
          <h3>Steps{plan.state === "proposed" ? "" : `: ${made.map(([state, count]) => `${count} ${state.replaceAll("_", " ")}`).join(", ")}`}</h3>
          <Grid name="steps" items={steps} empty="" columns={[
            { title: "guest", show: (step) => <a href={`#/guests/${step.guest}`}>{step.guest_name}</a> },
            { title: "way", show: (step) => `${step.from_name} → ${step.to_name}` },
            { title: "state", key: (step) => step.state, show: (step) => <>
              {step.operation ? <a href={`#/operations/${step.undo_operation ?? step.operation}`}><PlanMark of={step.state} /></a> : <PlanMark of={step.state} />}
              {step.waiting_since_ms ? <small> waits, {ago(step.waiting_since_ms, now.value)}</small> : null}
            </> },
            { title: "bytes", key: (step) => step.predicted_bytes, show: (step) => bytes(step.predicted_bytes), wide: true },
            { title: "takes", key: (step) => step.predicted_ms ?? -1, show: (step) => known(step.predicted_ms, duration), wide: true },
            { title: "pause", key: (step) => step.predicted_downtime_ms ?? -1, show: (step) => known(step.predicted_downtime_ms, duration), wide: true },
            { title: "why there", show: (step) => <span title={step.reason}>{step.reason}</span>, wide: true },
          ]} />
        </>
      )}
    </>
  );
}
