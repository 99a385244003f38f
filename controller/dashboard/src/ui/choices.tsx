// What policies chose for guests, and what they are about to do: with a veto for who may.
import { useState } from "preact/hooks";
import type { GuestVerdict, Market } from "../api/types";
import { may } from "../store/derive";
import { chosen } from "../store/good";
import { now, who } from "../store/store";
import { Sure } from "./dialog";
import { ago, price } from "./format";

const MOST_SHOWN = 5;

/** A policy moves only guests that follow prices: taking one out is what stops it. */
export function Veto(props: { verdict: GuestVerdict }) {
  const [isOpen, setOpen] = useState(false);
  const { verdict } = props;
  if (!may(who.value, "change")) return null;
  return (
    <>
      <button onClick={() => setOpen(true)}>Veto…</button>
      {isOpen && (
        <Sure title={`No policy moves ${verdict.guest_name}`} verb="Keep it where it is" close={() => setOpen(false)} ask={{ method: "PATCH", path: `/v1/guests/${verdict.guest}`, body: { follow_prices: false } }}>
          <p>It follows prices no more, until somebody says so on its page. A move that is under way is cancelled there.</p>
        </Sure>
      )}
    </>
  );
}

export function Choices(props: { verdicts: GuestVerdict[]; markets: Market[] }) {
  const cost = (name: string | null) => {
    const found = props.markets.find((market) => market.name === name);
    return found ? ` at ${price(found.price_nanousd_per_hour)}` : "";
  };
  const told = chosen(props.verdicts);
  if (told.chosen === null) {
    const cheapest = [...props.markets].sort((a, b) => a.price_nanousd_per_hour - b.price_nanousd_per_hour);
    return (
      <p>
        Cheapest now: <b>{cheapest[0]!.name}</b>{cost(cheapest[0]!.name)}
        {cheapest[1] && <>; next <b>{cheapest[1].name}</b>{cost(cheapest[1].name)}</>}.{" "}
        <span class="soft">No policy has told in the last five minutes what it chooses.</span>
      </p>
    );
  }
  const others = told.markets.slice(1);
  const shown = [...told.moves, ...props.verdicts.filter((one) => !one.is_move)].slice(0, MOST_SHOWN);
  const newest = props.verdicts.reduce((a, b) => (b.told_at_ms > a.told_at_ms ? b : a));
  return (
    <>
      <p>
        Chosen: <b>{told.chosen}</b>{cost(told.chosen)}, for {told.markets[0]![1]} of {props.verdicts.length} {props.verdicts.length === 1 ? "guest" : "guests"}
        {told.runnerUp && <>; runner-up <b>{told.runnerUp}</b>{cost(told.runnerUp)}</>}
        {others.length > 0 && <>; else {others.slice(0, 3).map(([name, count]) => `${name} for ${count}`).join(", ")}</>}.{" "}
        <span class="soft">{newest.policy}, told by {newest.actor} {ago(newest.told_at_ms, now.value)}</span>
      </p>
      <ul class="plain choices" aria-label="what policies decided">
        {shown.map((one) => (
          <li key={one.guest} class="line">
            <a href={`#/guests/${one.guest}`}>{one.guest_name}</a>
            <span class={`state ${one.is_move ? "busy" : "idle"}`}>{one.is_move ? "is to move" : "stays"}</span>
            <span class="small">{one.reason}</span>
            <span class="grow" /><Veto verdict={one} />
          </li>
        ))}
        {props.verdicts.length > shown.length && <li class="small soft">and {props.verdicts.length - shown.length} more</li>}
      </ul>
    </>
  );
}
