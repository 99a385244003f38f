import { useState } from "preact/hooks";
import { get } from "../api/http";
import type { Guest, Placement } from "../api/types";
import { Grid, Panel } from "./parts";

/** What each processor that a guest could be given gives up, and opens: asked for when somebody wants to know. */
export function Cpus(props: { guest: Guest }) {
  const { guest } = props;
  const [found, setFound] = useState<Placement["cpus"]>();
  const [problem, setProblem] = useState("");
  if (!guest.compat_class?.cpu_baseline.startsWith("x86.")) return null;
  const ask = async () => {
    try {
      setFound((await get<Placement>(`/v1/guests/${guest.id}/placement?explain`)).cpus ?? []);
      setProblem("");
    } catch (error) {
      setProblem(error instanceof Error ? error.message : String(error));
    }
  };
  return (
    <Panel title="Processor" aside={<span class="soft">{guest.cpu ?? "portable"}</span>}>
      {problem && <p class="bad" role="alert">{problem}</p>}
      {!found && <button type="button" onClick={() => void ask()}>What each choice gives up and opens</button>}
      {found && <Grid name="cpus" items={found.map((one) => ({ ...one, id: one.choice }))} empty="Where it runs, the back end has processors of its own." columns={[
        { title: "CPU", key: (one) => one.choice, show: (one) => (one.is_current ? <b>{one.choice}</b> : one.choice) },
        { title: "moves live to", key: (one) => one.hosts, show: (one) => `${one.hosts} ${one.hosts === 1 ? "host" : "hosts"}` },
        { title: "clouds", key: (one) => one.clouds, show: (one) => one.clouds },
        { title: "markets", key: (one) => one.markets, show: (one) => one.markets, wide: true },
        { title: "without", key: (one) => one.without.length, show: (one) => (one.without.length === 0 ? "–" : `${one.without.length} ${one.without.length === 1 ? "feature" : "features"}`) },
      ]} />}
      {found?.filter((one) => one.without.length > 0).map((one) => <details key={one.choice}><summary>What {one.choice} is without</summary><small>{one.without.join(", ")}</small></details>)}
      <p class="small soft">Another one from its next start on: <code>supercloud guest start {guest.name} --cpu host</code></p>
    </Panel>
  );
}
