import { marketRisk } from "../store/risk";
import { chosen } from "../store/good";
import { guests, hosts, markets, prices, decided } from "../store/store";
import { Chart } from "../ui/chart";
import { feedTime, price } from "../ui/format";
import { Empty, Grid, Panel } from "../ui/parts";

/** All series on one axis: the prices hold until their next point. What policies chose is strong, the runner-up dashed; where no policy has told, the cheapest and the next. */
export function PriceChart() {
  const told = chosen(decided.value);
  const rank = (name: string) => (name === told.chosen ? 0 : name === told.runnerUp ? 1 : 2);
  const found = [...markets.value].sort((a, b) => rank(a.name) - rank(b.name) || a.price_nanousd_per_hour - b.price_nanousd_per_hour).slice(0, 6);
  const series = found.map((market) => prices.value.get(market.name)).filter((one) => one !== undefined && one.points.length > 0);
  if (series.length === 0) return null;
  const end = Math.max(...series.map((one) => one!.feed_now_ms));
  const DAY = 86_400_000;
  const begin = end - DAY;
  const times = [...new Set(series.flatMap((one) => one!.points.map((point) => point.feed_time_ms)).filter((at) => at >= begin && at <= end))];
  const x = [...new Set([begin, ...times, end])].filter((at) => at >= 0).sort((a, b) => a - b);
  if (x.length < 2) return <Empty>The price feed has just begun: there is no line to draw yet.</Empty>;
  const lines = series.map((one, at_first) => {
    let at = -1;
    const points = one!.points;
    const values = x.map((time) => {
      while (at + 1 < points.length && points[at + 1]!.feed_time_ms <= time) at += 1;
      return at < 0 ? null : points[at]!.price_nanousd_per_hour;
    });
    const mark = told.chosen === null ? "" : one!.market === told.chosen ? " (chosen)" : one!.market === told.runnerUp ? " (runner-up)" : "";
    const [strong, dashed] = told.chosen === null ? [at_first === 0, at_first === 1] : [one!.market === told.chosen, one!.market === told.runnerUp];
    return { name: `${one!.market}${mark}`, values, strong, dashed };
  });
  return <Chart label="prices of the last day" x={x} series={lines} stepped y={price} xText={feedTime} />;
}

export function Markets() {
  const rows = markets.value.map((market) => ({ ...market, id: market.name }));
  const inCloud = (cloud: string) => {
    const here = new Set([...hosts.value.values()].filter((host) => host.cloud === cloud).map((host) => host.id));
    return [...guests.value.values()].filter((guest) => guest.host && guest.state === "running" && here.has(guest.host)).length;
  };
  return (
    <div class="tiles">
      <Panel title="Prices of the last day" wide aside={<a href="#/markets/simulator">try policies on a generated market</a>}>{rows.length === 0 ? <Empty>No price feed: give the controller one (<code>[feed]</code> in controller.toml).</Empty> : <PriceChart />}</Panel>
      {rows.length > 0 && (
        <Panel title="Markets" wide>
          <Grid name="markets" items={rows} empty="" columns={[
            { title: "price now", key: (market) => market.price_nanousd_per_hour, show: (market) => price(market.price_nanousd_per_hour) },
            { title: "market", key: (market) => market.name, show: (market) => market.name },
            { title: "on demand", key: (market) => market.on_demand_nanousd_per_hour ?? 0, show: (market) => market.on_demand_nanousd_per_hour ? price(market.on_demand_nanousd_per_hour) : "–" },
            { title: "saves", key: (market) => market.price_nanousd_per_hour / (market.on_demand_nanousd_per_hour || Infinity), show: (market) => market.on_demand_nanousd_per_hour ? `${Math.round((1 - market.price_nanousd_per_hour / market.on_demand_nanousd_per_hour) * 100)} %` : "–" },
            { title: "risk, as seen", key: (market) => (market.seen ? market.seen.taken / Math.max(1, market.seen.ran_ms) : -1), show: (market) => <span class={marketRisk(market).tone}>{marketRisk(market).text}</span> },
            { title: "since", key: (market) => market.feed_time_ms, show: (market) => feedTime(market.feed_time_ms), wide: true },
            { title: "guests in this cloud", key: (market) => inCloud(market.cloud), show: (market) => inCloud(market.cloud), wide: true },
          ]} />
        </Panel>
      )}
    </div>
  );
}
