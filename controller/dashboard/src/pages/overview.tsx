// The first screen: is anything wrong, what moves, where everything is, what it would cost, how good the moves were, who did what.
import { alarms, places, record } from "../store/derive";
import { isAtRest, tally } from "../store/plans";
import { areAllWays, clouds, evacuations, events, guests, hosts, ledger, markets, now, operations, plans, underWay, ways } from "../store/store";
import { Cancel } from "../ui/actions";
import { ago, duration, price } from "../ui/format";
import { Map_ } from "../ui/map";
import { Empty, Moving, Panel } from "../ui/parts";
import { PlanMark } from "../ui/plan";
import { CostFigures } from "./costs";
import { EventLine } from "./events";
import { PriceChart } from "./markets";
import { Turn, planName } from "./plans";

export function Alarms() {
  const found = alarms(guests.value.values(), hosts.value.values(), operations.value.values(), evacuations.value, now.value);
  return (
    <Panel title={found.length === 0 ? "Nothing is wrong" : `${found.length} to look at`}>
      {found.length === 0 ? (
        <p class="calm">{guests.value.size === 0 ? "No guest yet." : guests.value.size === 1 ? "The one guest is where it should be." : `All ${guests.value.size} guests are where they should be.`}</p>
      ) : (
        <ul class="alarms">
          {found.slice(0, 30).map((alarm, at) => (
            <li key={at} class={alarm.level}><a href={alarm.link}>{alarm.what}</a> {alarm.text}</li>
          ))}
        </ul>
      )}
    </Panel>
  );
}

export function Now(props: { still?: boolean }) {
  const moving = underWay.value;
  return (
    <Panel title={moving.length === 0 ? "Nothing moves" : `${moving.length} under way`} wide>
      {moving.length === 0 && <Empty>Moves, freezes and imports are shown here while they last.</Empty>}
      {moving.slice(0, 20).map((operation) => <Moving key={operation.id} operation={operation}>{!props.still && <Cancel operation={operation} />}</Moving>)}
      {moving.length > 20 && <p><a href="#/operations">and {moving.length - 20} more</a></p>}
    </Panel>
  );
}

export function Where() {
  const found = places(clouds.value.values(), hosts.value.values(), guests.value.values());
  return (
    <Panel title="Where everything is" wide>
      {found.length === 0 ? <Empty>No cloud yet: <code>supercloud cloud create NAME</code></Empty> : <Map_ places={found} operations={underWay.value} links={ways.value} />}
      {!areAllWays.value && <p class="small soft" role="note">This fleet has more ways than a page holds: the round trips and losses here are those of {ways.value.length} of them. Each host's page has all of its own.</p>}
    </Panel>
  );
}

function Good() {
  const MONTH = 30 * 86_400_000;
  const kept = record(operations.value.values(), now.value - MONTH);
  const text = (ms: number | null) => (ms === null ? "–" : duration(ms));
  return (
    <Panel title="How good the moves were (30 days)">
      <div class="figures">
        <div><b>{kept.moves}</b><span>moves</span></div>
        <div><b>{text(kept.downtimeP50)}</b><span>pause, median</span></div>
        <div><b>{text(kept.downtimeP99)}</b><span>pause, p99</span></div>
        <div><b>{kept.rolledBack}</b><span>rolled back</span></div>
        <div class={kept.failed > 0 ? "bad" : ""}><b>{kept.failed}</b><span>failed</span></div>
      </div>
    </Panel>
  );
}

function Cost() {
  const totals = ledger.value?.totals;
  if (!totals || totals.paid_nanousd + totals.unpriced_ms + totals.unpriced_bytes === 0) return null;
  return <Panel title="What it cost (31 days)" aside={<a href="#/costs">line by line</a>} wide><CostFigures /></Panel>;
}

function Next() {
  const cheapest = [...markets.value].sort((a, b) => a.price_nanousd_per_hour - b.price_nanousd_per_hour);
  if (cheapest.length === 0) return null;
  return (
    <Panel title="Prices" aside={<a href="#/markets">all markets</a>} wide>
      <p>
        Cheapest now: <b>{cheapest[0]!.name}</b> at {price(cheapest[0]!.price_nanousd_per_hour)}
        {cheapest[1] && <>; next <b>{cheapest[1].name}</b> at {price(cheapest[1].price_nanousd_per_hour)}</>}
      </p>
      <PriceChart />
    </Panel>
  );
}

/** Moves that were decided and not made yet: why, how far, and who may say no. */
function Coming() {
  const found = [...plans.value.values()].filter((plan) => plan.state === "proposed" || !isAtRest(plan.state)).sort((a, b) => b.created_at_ms - a.created_at_ms);
  if (found.length === 0) return null;
  return (
    <Panel title={found.length === 1 ? "One plan" : `${found.length} plans`} aside={<a href="#/plans">all plans</a>} wide>
      {found.slice(0, 5).map((plan) => (
        <div key={plan.id} class="moving">
          <div class="line">
            <a href={`#/plans/${plan.id}`}>{planName(plan)}</a><PlanMark of={plan.state} />
            <span>{plan.steps.length === 0 ? "no guest moves" : tally(plan.steps).map(([state, count]) => `${count} ${state.replaceAll("_", " ")}`).join(", ")}</span>
            <span class="grow" /><Turn plan={plan} />
          </div>
          <div class="line small"><span>{plan.reason ?? "no reason was given"}</span><span class="grow" /><span>{plan.actor}, {ago(plan.created_at_ms, now.value)}</span></div>
        </div>
      ))}
    </Panel>
  );
}

function Who() {
  const newest = events.value.slice(-12).reverse();
  return (
    <Panel title="Who did what" aside={<a href="#/events">audit trail</a>} wide>
      {newest.length === 0 ? <Empty>Nothing has happened yet.</Empty> : newest.map((event) => <EventLine key={event.seq} event={event} />)}
    </Panel>
  );
}

export function Overview() {
  return (
    <div class="tiles">
      <Alarms />
      <Good />
      <Now />
      <Coming />
      <Where />
      <Cost />
      <Next />
      <Who />
    </div>
  );
}

/** For a screen on a wall: nothing to press, nothing to scroll. */
export function Wall() {
  return (
    <div class="tiles wall">
      <Alarms />
      <Good />
      <Now still />
      <Where />
      <p class="small">as of {ago(now.value, Date.now())}</p>
    </div>
  );
}
