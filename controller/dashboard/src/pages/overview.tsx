// The first screen: is anything wrong, what moves, where everything is, what it would cost, how good the moves were, who did what.
import { heard } from "../api/http";
import { alarms, isStanding, places } from "../store/derive";
import { saved } from "../store/good";
import { tenures } from "../store/risk";
import { isAtRest, tally } from "../store/plans";
import { areAllWays, clouds, decided, evacuations, events, guests, hosts, ledger, link, markets, now, operations, plans, ledgerProblem, reliability, rentings, today, underWay, ways } from "../store/store";
import { Cancel } from "../ui/actions";
import { ago, duration, money, percent, price } from "../ui/format";
import { Map_ } from "../ui/map";
import { Empty, Moving, Panel } from "../ui/parts";
import { PlanMark } from "../ui/plan";
import { EventLine } from "./events";
import { Choices } from "../ui/choices";
import { PriceChart } from "./markets";
import { Turn, planName } from "./plans";

export function Alarms() {
  const found = alarms(guests.value.values(), hosts.value.values(), operations.value.values(), evacuations.value, decided.value, now.value);
  // Those that do not run are where they should be, too; but nobody shall think that they run.
  const counts = new Map<string, number>();
  for (const guest of guests.value.values()) if (guest.state !== "running") counts.set(guest.state, (counts.get(guest.state) ?? 0) + 1);
  const resting = [...counts];
  // What was so when the controller was last heard is not said of now.
  const isKnown = link.value === "live";
  return (
    <Panel title={!isKnown ? "Not known now" : found.length === 0 ? "Nothing is wrong" : `${found.length} to look at`}>
      {!isKnown && <p class="soft">The controller does not answer. When it last did, {found.length === 0 ? "nothing was wrong" : "this was to be looked at"}.</p>}
      {found.length === 0 ? (
        <><p class={isKnown ? "calm" : "soft"}>{!isKnown ? "" : guests.value.size === 0 ? "No guest yet." : guests.value.size === 1 ? "The one guest is where it should be." : `All ${guests.value.size} guests are where they should be.`}</p>
          {resting.length > 0 && <p class="small soft">{resting.map(([state, count]) => `${count} ${state === "created" ? "never started" : state}`).join(", ")}.</p>}</>
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
  const moving = underWay.value.filter((operation) => !isStanding(operation));
  const standing = underWay.value.length - moving.length;
  return (
    <Panel title={moving.length === 0 ? "Nothing moves" : `${moving.length} under way`} wide aside={standing > 0 && <a href="#/operations">{standing === 1 ? "one mirror stands" : `${standing} mirrors stand`}</a>}>
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
      {found.length === 0 ? <Empty>No cloud yet: <code>supercloud cloud create NAME</code></Empty> : <Map_ places={found} operations={underWay.value} links={ways.value} tenures={tenures(hosts.value.values(), rentings.value.values(), ledger.value?.items ?? [])} />}
      {!areAllWays.value && <p class="small soft" role="note">This fleet has more ways than a page holds: the round trips and losses here are those of {ways.value.length} of them. Each host's page has all of its own.</p>}
    </Panel>
  );
}

function Good() {
  const kept = reliability.value;
  if (!kept) return null;
  const text = (ms: number | null | undefined) => (ms === null || ms === undefined ? "–" : duration(ms));
  const missed = kept.missed_by_moves + kept.missed_by_notices;
  const missedText = [kept.missed_by_moves > 0 && `${kept.missed_by_moves} by moves`, kept.missed_by_notices > 0 && `${kept.missed_by_notices} when a provider took a host`].filter(Boolean).join(", ");
  return (
    <Panel title="How good it was (30 days)">
      <div class="figures">
        <div class={kept.lost_ms > 0 ? "bad" : ""}><b>{typeof kept.availability_ppm === "number" ? percent(kept.availability_ppm) : "–"}</b><span>available</span></div>
        <div><b>{kept.moves}</b><span>moves</span></div>
        <div><b>{text(kept.downtime_p50_ms)}</b><span>pause, median</span></div>
        <div><b>{text(kept.downtime_p99_ms)}</b><span>pause, p99</span></div>
        <div class={missed > 0 ? "bad" : ""} title={missedText}><b>{missed}</b><span>deadlines missed</span></div>
        <div><b>{kept.rolled_back}</b><span>rolled back</span></div>
        <div class={kept.failed > 0 ? "bad" : ""}><b>{kept.failed}</b><span>failed</span></div>
      </div>
      {kept.lost_ms > 0 && <p class="small">Guests ran nowhere for {duration(kept.lost_ms)}, all together.</p>}
    </Panel>
  );
}

/** What was saved, or what was paid too much; a dash where nothing can be compared. */
function Saved(props: { by: number | null; span: string }) {
  if (props.by === null) return <div><b>–</b><span>saved {props.span}</span></div>;
  return <div class={props.by < 0 ? "bad" : "good"}><b>{money(Math.abs(props.by))}</b><span>{props.by < 0 ? "more than on demand" : "saved"} {props.span}</span></div>;
}

function Cost() {
  const rate = today.value?.rate;
  const month = ledger.value;
  if (!rate && !month) return ledgerProblem.value ? <Panel title="What it costs" wide><p class="small warn" role="note">It is not told: {ledgerProblem.value}.</p></Panel> : null;
  const isNothing = !month || month.totals.paid_nanousd + month.totals.unpriced_ms + month.totals.unpriced_bytes === 0;
  if (isNothing && (!rate || rate.paid_nanousd_per_hour + rate.unpriced_hosts === 0)) return null;
  return (
    <Panel title="What it costs" aside={<a href="#/costs">line by line</a>} wide>
      <div class="figures">
        {rate && <div><b>{rate.paid_nanousd_per_hour === 0 && rate.unpriced_hosts > 0 ? "not known" : price(rate.paid_nanousd_per_hour)}</b><span>now</span></div>}
        {rate && rate.on_demand_nanousd_per_hour > 0 && <div><b>{price(rate.on_demand_nanousd_per_hour)}</b><span>the same on demand{rate.comparable_nanousd_per_hour < rate.paid_nanousd_per_hour ? `, of ${price(rate.comparable_nanousd_per_hour)}` : ""}</span></div>}
        <Saved by={saved(today.value)} span="today" />
        <Saved by={saved(month)} span="in 30 days" />
        {month && <div><b>{month.totals.paid_nanousd === 0 && month.totals.unpriced_ms > 0 ? "not known" : money(month.totals.paid_nanousd)}</b><span>paid in 30 days</span></div>}
      </div>
      {rate && rate.unpriced_hosts > 0 && <p class="small soft">Of {rate.unpriced_hosts} {rate.unpriced_hosts === 1 ? "host" : "hosts"} no price is known.</p>}
      {ledgerProblem.value && <p class="small warn" role="note">Not told anew: {ledgerProblem.value}.</p>}
      {month?.clock === "feed" && <p class="small soft">By the clock of the price feed.</p>}
    </Panel>
  );
}

function Next() {
  if (markets.value.length === 0) return null;
  return (
    <Panel title="What comes next" aside={<a href="#/markets">all markets</a>} wide>
      <Choices verdicts={decided.value} markets={markets.value} />
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
      <p class={`small${now.value - heard.value > 60_000 ? " bad" : ""}`}>The controller was last heard of {ago(heard.value, now.value)}.</p>
    </div>
  );
}
