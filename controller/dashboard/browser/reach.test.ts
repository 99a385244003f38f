// How hosts reach each other, what lies where, what a volume was: what only agents tell is set, all else is the real controller's.
import type { Browser } from "playwright-core";
import { afterAll, beforeAll, describe, expect, it } from "vitest";
import { Controller, Rest, emptyImage, silentHost } from "./controller";
import { pointHash } from "../src/store/points";
import { type Desk, VIEWS, type View, barriers, desk, open, shot, sideways, visit } from "./look";

let browser: Browser;
let controller: Controller;
let rest: Rest;
let web: { id: string; name: string; project: string; volumes: string[]; ports: string[] };
let network: string;
const hosts: string[] = [];
const clouds: string[] = [];

beforeAll(async () => {
  [browser, controller] = await Promise.all([open(), Controller.start()]);
  rest = controller.rest();
  await emptyImage(rest, "blank");
  for (const name of ["home", "west"]) clouds.push((await rest.must("POST", "/v1/clouds", { name })).id);
  network = (await rest.must("POST", "/v1/networks", { name: "office", cidr: "10.20.0.0/24" })).id;
  const shape = { vcpus: 1, memory_bytes: 64 << 20 };
  for (const name of ["web", "db"]) await rest.must("POST", "/v1/guests", { name, image: "blank", network: "office", shape, start: false });
  web = (await rest.must("GET", "/v1/guests?limit=10")).items.find((one: { name: string }) => one.name === "web");
  hosts.push(await silentHost(rest, "h1", "home"), await silentHost(rest, "h2", "west"));
});
afterAll(async () => {
  await browser?.close();
  await controller?.remove();
});

const NOW = Date.now();
const link = (from: number, to: number, more: object) => ({
  from: hosts[from], from_name: `h${from + 1}`, from_cloud: clouds[from], from_cloud_name: ["home", "west"][from],
  to: hosts[to], to_name: `h${to + 1}`, to_cloud: clouds[to], to_cloud_name: ["home", "west"][to],
  state: "answers", why: null, rtt_us: 40_300, rtt_least_us: 40_050, loss: 0.04, probes: 24, answered: 24, sent: 25, resent: 1,
  answered_at_ms: NOW, told_at_ms: NOW, ...more,
});
const DEAD = { state: "silent", why: "no answer to the last 3 probes", rtt_us: null, rtt_least_us: null, loss: null, answered: 0, sent: 0, resent: 0 };

const places = (view: View): string => `${view.width}-${view.dark ? "dark" : "light"}`;

async function begin(view = VIEWS[0]!, token = controller.token, isSilent = false): Promise<Desk> {
  const found = await desk(browser, controller.url, token, view);
  await found.page.route("**/v1/links?*", (route) => route.fulfill({ json: { items: [link(0, 1, isSilent ? DEAD : {}), link(1, 0, isSilent ? DEAD : { rtt_us: 41_000 })] } }));
  return found;
}

/** Both guests run, as far as the page knows: one on each host. */
async function runs(found: Desk): Promise<void> {
  await found.page.route("**/v1/ports?*", async (route) => {
    const json = await (await route.fetch()).json();
    for (const one of json.items) one.host = one.guest === web.id ? hosts[0] : hosts[1];
    await route.fulfill({ json });
  });
}

describe("the ways between hosts", () => {
  it("are on the map and in a table, with round trips and loss", async () => {
    for (const view of VIEWS) {
      const { context, page, problems } = await begin(view);
      await visit(page, "");
      await page.getByText("to west: 41 ms, 4.0 % lost").waitFor();
      await page.getByText("to home: 41 ms, 4.0 % lost").waitFor();
      // One above the other they have no arc: it would go through what is written.
      await expect.poll(() => page.locator(".arcs path.way.answers").count()).toBe(view.width > 1000 ? 1 : 0);
      expect(await sideways(page)).toBe(0);
      expect(await barriers(page)).toEqual([]);
      await shot(page, `scripted-reach-map-${places(view)}`);
      await visit(page, "hosts");
      const table = page.getByRole("region", { name: "links", exact: true });
      expect(await table.innerText()).toMatch(/40 ms[\s\S]*4\.0 % lost/);
      expect(await sideways(page)).toBe(0);
      expect(await barriers(page)).toEqual([]);
      await shot(page, `scripted-reach-hosts-${places(view)}`);
      await visit(page, "hosts/h1");
      await page.getByRole("region", { name: "links of h1" }).getByText("4.0 % lost").first().waitFor();
      expect(await barriers(page)).toEqual([]);
      expect(problems).toEqual([]);
      await context.close();
    }
  });

  it("that are silent are said to be, and of what nobody measures no figure is shown", async () => {
    const silent = await begin(VIEWS[0], controller.token, true);
    await visit(silent.page, "");
    await silent.page.getByText("to west: no answer").waitFor();
    expect(await silent.page.locator(".arcs path.way.silent").count()).toBe(1);
    await shot(silent.page, "scripted-reach-silent");
    await silent.context.close();
    // The real controller's own answer: nobody has dialled in.
    const { context, page } = await desk(browser, controller.url, controller.token);
    expect((await rest.must("GET", "/v1/links")).items).toEqual([]);
    await visit(page, "hosts");
    await page.getByText("No two hosts of which one can dial the other.").waitFor();
    await context.close();
  });
});

describe("a network", () => {
  it("is drawn with its hosts and the tunnels between them", async () => {
    for (const view of VIEWS) {
      const found = await begin(view);
      const { context, page, problems } = found;
      await runs(found);
      await visit(page, `networks/${network}`);
      const drawing = page.getByRole("img", { name: "office: 2 hosts, 1 tunnel" });
      await drawing.waitFor();
      await page.getByRole("region", { name: "tunnels of office" }).getByText("40 ms, 4.0 % lost").waitFor();
      expect(await drawing.locator("line.answers").count()).toBe(1);
      expect(await sideways(page)).toBe(0);
      expect(await barriers(page)).toEqual([]);
      await shot(page, `scripted-reach-network-${places(view)}`);
      expect(problems).toEqual([]);
      await context.close();
    }
  });

  it("tells the flows of a port, asked of its host, and the paths to the others", async () => {
    const port = web.ports[0]!;
    const flow = (purpose: string, table: number, matching: string, actions: string, packets: number) => ({ purpose, table, priority: 80, packets, bytes: packets * 98, age_s: 700, matching, actions });
    const told = {
      port, network, host: hosts[0], host_name: "h1", asked_at_ms: Date.now(), left_out: 0,
      traffic: { sent_packets: 120, sent_bytes: 9000, received_packets: 80, received_bytes: 7000, dropped_packets: 2 },
      flows: [
        flow("guest", 0, "in_port=sct1,eth_src=02:00:00:00:00:01,eth_type=0x800,ip_src=10.20.0.2", "set:reg0=0x65,set:reg1=1,goto:4", 120),
        flow("deliver", 4, "reg0=0x65,eth_dst=02:00:00:00:00:01", "output:sct1", 80), flow("flood", 4, "reg0=0x65,reg1=1,eth_dst=01:00:00:00:00:00/01:00:00:00:00:00", "output:sct1,set:tun_id=0x65,output:tunnel(h2)", 3),
      ],
    };
    for (const view of VIEWS) {
      const found = await begin(view);
      const { context, page, problems } = found;
      await runs(found);
      await page.route("**/v1/ports/*/flows", (route) => route.fulfill({ json: told }));
      await visit(page, `ports/${port}`);
      const flows = page.getByRole("region", { name: "flows", exact: true });
      expect(await flows.innerText()).toMatch(/what the guest may send\s+120/);
      await page.getByText("dropped at the port").waitFor();
      await page.getByRole("region", { name: "paths" }).getByText("tunnel h1 ↔ h2").waitFor();
      expect(await sideways(page)).toBe(0);
      expect(await barriers(page)).toEqual([]);
      await shot(page, `scripted-reach-flows-${places(view)}`);
      expect(problems).toEqual([]);
      await context.close();
    }
    // In truth its guest runs nowhere, and the controller says so.
    const { context, page } = await begin();
    await visit(page, `ports/${port}`);
    await page.getByText("the port's guest runs nowhere").waitFor();
    await context.close();
  });
});

describe("time travel", () => {
  const at = (minutes: number) => NOW - minutes * 60_000;
  const point = (number: number, minutes: number) => ({ number, at_ms: at(minutes), tick: 0, epoch: 2, version: number * 100, root: "ab".repeat(32), cloud: clouds[1], stored_bytes: number << 20, hash: "cd".repeat(32) });
  const history = () => {
    // Chained as the controller does it.
    let head = "0".repeat(64);
    const points = [point(1, 180), point(2, 120), point(3, 90), point(4, 60), point(5, 15)].map((one) => ({ ...one, hash: (head = pointHash(web.volumes[0]!, head, one as never)) }));
    const [thin] = points.splice(2, 1);
    return { volume: web.volumes[0], project: web.project, policy: { every_s: 900, keep: [{ for_s: 14_400, every_s: 900 }] }, points, thinned: [{ from: 3, to: 3, hash: thin!.hash }], next: 6, head, seen_base: null, problem: null, created_at_ms: at(200) };
  };

  it("chooses an instant with a slider, and makes a guest of it after a look", async () => {
    for (const view of VIEWS) {
      const { context, page, problems } = await begin(view);
      await page.route("**/v1/volumes/*/history", (route) => route.fulfill({ json: history() }));
      await visit(page, `volumes/${web.volumes[0]}`);
      const slider = page.getByRole("slider", { name: "as of" });
      await slider.waitFor();
      await page.getByText("✓ 4 points have the hash of what is told of them and of the one before; 1 thinned out are accounted for.").waitFor();
      const panel = page.getByRole("region", { name: "Time travel" });
      await panel.getByText(/point 5,/).waitFor();
      // Half way between the first and now, 90 minutes ago, the second was the newest.
      await slider.fill("5000");
      await panel.getByText(/point 2,/).waitFor();
      await panel.getByText("2.0 MiB").first().waitFor();
      await page.getByRole("button", { name: "later point" }).click();
      await panel.getByText(/point 4,/).waitFor();
      expect(await slider.getAttribute("aria-valuetext")).toContain("point 4");
      expect(await sideways(page)).toBe(0);
      expect(await barriers(page)).toEqual([]);
      await shot(page, `scripted-reach-travel-${places(view)}`);
      expect(problems).toEqual([]);
      await context.close();
    }
    const { context, page } = await begin();
    await page.route("**/v1/volumes/*/history", (route) => route.fulfill({ json: history() }));
    await visit(page, `volumes/${web.volumes[0]}`);
    await page.getByRole("slider", { name: "as of" }).fill("0");
    await page.getByRole("button", { name: "New guest from point 1…" }).click();
    const [look] = await Promise.all([page.waitForRequest("**/v1/guests?dry_run=true"), page.getByRole("button", { name: "Look first" }).click()]);
    expect(look.postDataJSON()).toMatchObject({ name: "web-then", disk_from: { volume: web.volumes[0], point: 1 }, network });
    // The controller itself has no such point, and says so: nothing is made.
    await page.getByRole("dialog").getByRole("alert").filter({ hasText: "keeps no history" }).waitFor();
    expect(await page.getByRole("button", { name: "Make it" }).count()).toBe(0);
    expect(await barriers(page)).toEqual([]);
    await shot(page, "scripted-reach-travel-clone");
    await context.close();
  });

  it("keeps points as it is told, by the real controller, and ends that", async () => {
    const { context, page } = await begin();
    await visit(page, `volumes/${web.volumes[0]}`);
    await page.getByText("No points are kept of this volume.").waitFor();
    await page.getByRole("button", { name: "Keep points…" }).click();
    await page.getByLabel("One every").fill("30m");
    await page.getByLabel("Kept").fill("4h:x");
    expect(await page.getByRole("button", { name: "Look first" }).isDisabled()).toBe(true);
    await page.getByLabel("Kept").fill("4h:30m 2d:1h");
    await page.getByRole("button", { name: "Look first" }).click();
    await page.getByText("No point would go.").waitFor();
    await page.getByRole("button", { name: "Keep them so" }).click();
    await page.getByText("one is taken every 30 min").waitFor();
    expect((await rest.must("GET", `/v1/volumes/${web.volumes[0]}/history`)).policy).toEqual({ every_s: 1800, keep: [{ for_s: 14_400, every_s: 1800 }, { for_s: 172_800, every_s: 3600 }] });
    await page.getByRole("button", { name: "Take a point now" }).click();
    await page.getByRole("region", { name: "Time travel" }).getByRole("alert").waitFor();
    await shot(page, "reach-travel-policy");
    await page.getByRole("button", { name: "End…" }).click();
    await page.getByRole("button", { name: "Give all points up" }).click();
    await page.getByText("No points are kept of this volume.").waitFor();
    await context.close();
  });

  it("has no buttons for who only looks", async () => {
    const { secret } = await rest.must("POST", "/v1/tokens", { name: "looks", role: "viewer", project: web.project });
    const { context, page } = await begin(VIEWS[0], secret);
    await page.route("**/v1/volumes/*/history", (route) => route.fulfill({ json: history() }));
    await visit(page, `volumes/${web.volumes[0]}`);
    await page.getByRole("slider", { name: "as of" }).waitFor();
    expect(await page.locator("main").getByRole("button", { name: /…|now|Check/ }).count()).toBe(0);
    await context.close();
  });
});

describe("what lies where", () => {
  it("is what the controller's records say", async () => {
    for (const view of VIEWS) {
      const { context, page } = await begin(view);
      await visit(page, "images");
      await page.getByRole("link", { name: "blank" }).first().click();
      await page.getByRole("region", { name: "where it lies" }).getByText("the controller's store").waitFor();
      expect(await sideways(page)).toBe(0);
      expect(await barriers(page)).toEqual([]);
      await shot(page, `reach-image-${places(view)}`);
      await visit(page, `volumes/${web.volumes[0]}`);
      await page.getByRole("region", { name: "where it lies" }).getByText("what it stands on").waitFor();
      await context.close();
    }
  });
});
