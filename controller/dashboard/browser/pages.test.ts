// Pages for what needs hosts, and hosts are elsewhere: what only an agent would tell is set, all else is the real controller's.
import type { Browser } from "playwright-core";
import { afterAll, beforeAll, describe, expect, it } from "vitest";
import { Controller, Rest, emptyImage, silentHost } from "./controller";
import { VIEWS, barriers, desk, open, shot, sideways, visit } from "./look";
import { Serial } from "./serial";

let browser: Browser;
let controller: Controller;
let rest: Rest;
let web: { id: string; name: string; project: string };
let h1: string;
let h2: string;

beforeAll(async () => {
  [browser, controller] = await Promise.all([open(), Controller.start()]);
  rest = controller.rest();
  await emptyImage(rest, "blank");
  await rest.must("POST", "/v1/clouds", { name: "home" });
  await rest.must("POST", "/v1/networks", { name: "office", cidr: "10.20.0.0/24" });
  const shape = { vcpus: 1, memory_bytes: 64 << 20 };
  await rest.must("POST", "/v1/guests", { name: "web", image: "blank", network: "office", shape, start: false });
  web = (await rest.must("GET", "/v1/guests")).items[0];
  h1 = await silentHost(rest, "h1", "home");
  h2 = await silentHost(rest, "h2", "home");
});
afterAll(async () => {
  await browser?.close();
  await controller?.remove();
});

describe("the serial console", () => {
  let serial: Serial;
  let door: string;
  const begin = async (view = VIEWS[0]!) => {
    const found = await desk(browser, door, undefined, view);
    // It runs, as far as the page knows.
    await found.page.route("**/v1/guests?*", async (route) => {
      const json = await (await route.fetch()).json();
      for (const one of json.items) one.state = "running";
      await route.fulfill({ json });
    });
    const stays = { guest: web.id, host: "hst-01a1fea9-e622-75ca-b41b-c7d245b5cc2f", host_name: "h", state: "not_needed", notice_ms: 120_000, detail: "it is nobody's to take back" };
    await found.page.route("**/v1/guests/*/evacuation", (route) => route.fulfill({ json: stays }));
    return found;
  };
  beforeAll(async () => {
    serial = new Serial(controller.url, controller.ca, controller.token, web.id);
    door = await serial.start();
    serial.say("\x1b[2J\x1b[HWelcome to web\r\n\r\n# ");
  });
  afterAll(() => serial?.stop());

  it("shows what the guest said, types into it, and edits a line", async () => {
    const { context, page, problems } = await begin();
    await visit(page, `guests/${web.id}`);
    await page.getByRole("button", { name: "Open the console" }).click();
    const screen = page.getByRole("region", { name: "console of web" });
    await screen.getByText("Welcome to web").waitFor();
    await page.keyboard.type("hallo");
    for (let at = 0; at < 4; at += 1) await page.keyboard.press("Backspace");
    await page.keyboard.type("ello");
    await page.keyboard.press("Enter");
    await screen.getByText("HELLO", { exact: true }).waitFor();
    expect(serial.typed).toBe("hallo\x7f\x7f\x7f\x7fello\r");
    expect(await screen.locator(".f10").innerText()).toBe("HELLO");
    // Keys that a browser would take for itself are the guest's; there is a way out all the same.
    await page.keyboard.press("Control+c");
    await page.keyboard.press("Tab");
    await expect.poll(() => serial.typed.slice(-2)).toBe("\x03\t");
    // Much at once is still in order, and what is above can be scrolled to.
    for (let at = 0; at < 2000; at += 1) serial.say(`\x1b[3${at % 8}mline ${at}\x1b[0m\r\n`);
    await screen.getByText("line 1999", { exact: true }).waitFor();
    expect(await screen.locator(":scope > div").count()).toBeLessThanOrEqual(1024);
    expect(await screen.evaluate((box) => box.scrollHeight - box.scrollTop - box.clientHeight)).toBeLessThan(8);
    await page.keyboard.press("Control+]");
    expect(await page.evaluate(() => document.activeElement?.textContent)).toBe("Close");
    expect(await barriers(page)).toEqual([]);
    await shot(page, "console");
    await page.keyboard.press("Enter");
    await screen.waitFor({ state: "hidden" });
    expect(problems).toEqual([]);
    await context.close();
  });

  it("follows the guest, tells when another reader took it, and takes it back", async () => {
    const { context, page } = await begin();
    await visit(page, `guests/${web.id}/console`);
    const screen = page.getByRole("region", { name: "console of web" });
    serial.say("\r\nthe last before the move\r\n# ");
    await screen.getByText("the last before the move").waitFor();
    serial.isAway = true;
    serial.end("the guest has left this host, or was switched off");
    await page.getByText("following it").waitFor();
    await shot(page, "console-following");
    serial.say("said while it moved\r\n# ");
    serial.isAway = false;
    await screen.getByText("said while it moved").waitFor();
    // The past is not shown twice.
    expect(await screen.getByText("the last before the move").count()).toBe(1);
    await page.keyboard.type("x");
    await expect.poll(() => serial.typed.slice(-1)).toBe("x");
    const other = await begin();
    await visit(other.page, `guests/${web.id}/console`);
    await page.getByText("Somebody else opened this console").waitFor();
    expect(await barriers(page)).toEqual([]);
    await shot(page, "console-taken");
    await page.getByRole("button", { name: "Take it back" }).click();
    await other.page.getByText("Somebody else opened this console").waitFor();
    expect(await screen.getByText("said while it moved").count()).toBe(1);
    await other.context.close();
    await context.close();
  });

  it("is within a small screen, and nothing for a viewer", async () => {
    for (const view of VIEWS) {
      const { context, page } = await begin(view);
      await visit(page, `guests/${web.id}/console`);
      await page.getByRole("region", { name: "console of web" }).getByText("said while it moved").waitFor();
      expect(await sideways(page)).toBe(0);
      await shot(page, `console-${view.width}-${view.dark ? "dark" : "light"}`);
      await context.close();
    }
    const { secret } = await rest.must("POST", "/v1/tokens", { name: "looker", role: "viewer", project: web.project });
    const { context, page } = await desk(browser, controller.url, secret);
    await page.route("**/v1/guests?*", async (route) => {
      const json = await (await route.fetch()).json();
      for (const one of json.items) one.state = "running";
      await route.fulfill({ json });
    });
    await visit(page, `guests/${web.id}/console`);
    await page.getByRole("heading", { name: "web", exact: true }).waitFor();
    expect(await page.getByText("Serial console").count()).toBe(0);
    expect((await rest.as(secret).send("GET", `/v1/guests/${web.id}/console`)).status).toBe(403);
    await context.close();
  });
});

describe("plans", () => {
  it("are looked at from a host, kept, applied and taken back", async () => {
    const { context, page, problems } = await desk(browser, controller.url, controller.token);
    await visit(page, "hosts/h1");
    await page.getByRole("button", { name: "Drain…" }).click();
    const dialog = page.getByRole("dialog", { name: "Drain h1" });
    await dialog.getByLabel("Why").fill("a disk fails");
    await dialog.getByRole("button", { name: "Look first" }).click();
    await dialog.getByText("No guest has to move.").waitFor();
    // Looked at, and not even kept.
    expect((await rest.must("GET", "/v1/plans")).items).toEqual([]);
    expect(await barriers(page)).toEqual([]);
    await shot(page, "plan-look");
    await dialog.getByRole("button", { name: "Keep this plan" }).click();
    await page.getByRole("button", { name: "Apply…" }).waitFor();
    expect((await rest.must("GET", "/v1/plans")).items.map((one: { state: string }) => one.state)).toEqual(["proposed"]);
    await page.getByRole("button", { name: "Apply…" }).click();
    await page.getByRole("button", { name: "Apply now" }).click();
    await page.locator("main .state", { hasText: "done" }).waitFor();
    expect(await page.getByText("h1 (cordoned)").count()).toBe(1);
    expect((await rest.must("GET", "/v1/plans")).items[0]).toMatchObject({ state: "done", reason: "a disk fails" });
    await page.getByRole("button", { name: "Take back…" }).click();
    await page.getByRole("button", { name: "Take back now" }).click();
    await page.locator("main .state", { hasText: "taken back" }).waitFor();
    expect((await rest.must("GET", "/v1/plans")).items[0].cordons[0].state).toBe("lifted");
    await expect.poll(() => page.getByRole("button", { name: /Apply|Cancel|Take back/ }).count()).toBe(0);
    await visit(page, "plans");
    await page.getByRole("link", { name: "Drain h1" }).waitFor();
    expect(problems).toEqual([]);
    await context.close();
  });

  it("of a cloud are cancelled before they begin, and what cannot be is told", async () => {
    const { context, page } = await desk(browser, controller.url, controller.token);
    await visit(page, "hosts");
    await page.getByRole("button", { name: "Evacuate…" }).click();
    const dialog = page.getByRole("dialog", { name: "Evacuate home" });
    await dialog.getByRole("button", { name: "Look first" }).click();
    await dialog.getByRole("button", { name: "Keep this plan" }).click();
    await page.getByRole("heading", { name: "Evacuate home" }).waitFor();
    await page.getByRole("button", { name: "Cancel…" }).click();
    await page.getByRole("button", { name: "Cancel now" }).click();
    await page.locator("main .state", { hasText: "cancelled" }).waitFor();
    await visit(page, "plans");
    await page.getByRole("button", { name: "New plan…" }).click();
    const asked = page.getByRole("dialog", { name: "New plan" });
    // No host is heard of: there is nothing to balance.
    await asked.getByLabel("Hosts may be this far apart").fill("30");
    await asked.getByRole("button", { name: "Look first" }).click();
    await asked.getByText("No guest has to move.").or(asked.getByRole("alert")).waitFor();
    expect(await asked.getByRole("button", { name: "Keep this plan" }).count()).toBe(0);
    expect(await barriers(page)).toEqual([]);
    await context.close();
  });

  it("show what moves, what it costs and what stays, at every width, in both colours", async () => {
    const at = Date.now();
    const id = (noun: string, last: string) => `${noun}-01a1fea9-e622-75ca-b41b-c7d245b5c${last}`;
    const step = (last: string, name: string, state: string, more: object = {}) => ({
      guest: id("gst", last), guest_name: name, project: web.project, from: h1, from_name: "h1", to: h2, to_name: "h2", reason: "the least loaded host of home that takes its compat class",
      predicted_bytes: 256 << 20, predicted_ms: 9000, predicted_downtime_ms: 450, egress_nanousd: 0, state, operation: null, undo_operation: null, error: null, waiting_since_ms: null, ...more,
    });
    const plan = {
      id: id("pln", "c2f"), kind: "drain", host: h1, cloud: null, band_percent: null, is_all_or_none: false, state: "running",
      cordons: [{ host: h1, host_name: "h1", state: "cordoned" }],
      steps: [
        step("a01", "web-1", "done", { operation: id("opn", "b01") }), step("a02", "database-with-a-long-name", "running", { operation: id("opn", "b02") }),
        step("a03", "web-3", "failed", { error: { status: 409, code: "no_room", title: "no room", detail: "no host takes it: h2 has 128 MiB of memory left" } }),
        step("a04", "web-4", "pending", { waiting_since_ms: at - 20_000, error: { status: 409, code: "busy", title: "busy", detail: "another operation of it is under way" } }),
      ],
      stuck: [{ guest: id("gst", "a05"), guest_name: "licence-server", host_name: "h1", reason: "it is pinned to this host" }],
      cost: { moves: 4, bytes: 4 * (256 << 20), egress_nanousd: null, predicted_ms: 36_000, longest_downtime_ms: 450 },
      risks: ["h2 would be at 93 % of its memory"], reason: "a disk fails", actor: "token:bootstrap-admin", request_id: id("req", "c2f"), created_at_ms: at - 60_000, updated_at_ms: at, ended_at_ms: null,
    };
    const found: string[] = [];
    for (const view of VIEWS) {
      const { context, page, problems } = await desk(browser, controller.url, controller.token, view);
      await page.route("**/v1/plans?*", (route) => route.fulfill({ json: { items: [plan], next_page: null } }));
      await page.route(`**/v1/plans/${plan.id}`, (route) => route.fulfill({ json: plan }));
      await page.route("**/v1/hosts?*", async (route) => {
        const json = await (await route.fetch()).json();
        for (const host of json.items) {
          host.capacity = { vcpus: 8, memory_bytes: 2 ** 30, disk_bytes: 2 ** 36 };
          host.used = { vcpus: 4, memory_bytes: host.name === "h1" ? 0.8 * 2 ** 30 : 0.6 * 2 ** 30, disk_bytes: 2 ** 34 };
        }
        await route.fulfill({ json });
      });
      await visit(page, `plans/${plan.id}`);
      await page.getByText("no host takes it").waitFor();
      await page.getByText("stays on h1: it is pinned to this host").waitFor();
      // One is there, one has failed; what is still ahead goes from the one to the other: 0.5 GiB.
      const rows = page.getByRole("region", { name: "hosts before and after" }).locator("tbody tr");
      expect(await rows.nth(0).innerText()).toMatch(/h1[\s\S]*80 %[\s\S]*30 %/);
      expect(await rows.nth(1).innerText()).toMatch(/h2[\s\S]*60 %[\s\S]*110 %/);
      expect(await page.getByRole("button", { name: "Cancel…" }).count()).toBe(1);
      expect(await page.getByRole("list", { name: "steps with trouble" }).innerText()).toContain("web-4 waits: another operation");
      const name = `plan-${view.width}-${view.dark ? "dark" : "light"}`;
      const far = await sideways(page);
      if (far > 0) found.push(`${name}: scrolls sideways by ${far} px`);
      found.push(...(await barriers(page)).map((one) => `${name}: ${one}`), ...problems);
      await shot(page, name);
      await context.close();
    }
    expect(found).toEqual([]);
    const { context, page } = await desk(browser, controller.url, controller.token, { width: 360, dark: true });
    await visit(page, "plans");
    await page.getByRole("button", { name: "New plan…" }).click();
    await page.getByLabel("What for").selectOption("gather");
    expect(await sideways(page)).toBe(0);
    expect(await barriers(page)).toEqual([]);
    await shot(page, "plan-gather-360");
    await context.close();
  });

  it("are not for a token of one project, nor are their buttons for who only looks", async () => {
    const { secret } = await rest.must("POST", "/v1/tokens", { name: "one-project", role: "admin", project: web.project });
    const one = await desk(browser, controller.url, secret);
    await visit(one.page, "hosts/h1");
    await one.page.getByRole("heading", { name: "h1", exact: true }).waitFor();
    expect(await one.page.getByRole("link", { name: "Plans" }).count()).toBe(0);
    expect(await one.page.getByRole("button", { name: "Drain…" }).count()).toBe(0);
    expect(one.problems).toEqual([]);
    await one.context.close();
    const viewer = (await rest.must("POST", "/v1/tokens", { name: "sees-all", role: "viewer", project: "*" })).secret;
    const all = await desk(browser, controller.url, viewer);
    await visit(all.page, "plans");
    await all.page.getByRole("link", { name: "Drain h1" }).click();
    await all.page.getByText("What it does").waitFor();
    expect(await all.page.locator("main").getByRole("button", { name: /…/ }).count()).toBe(0);
    await all.context.close();
  });
});

describe("the simulator", () => {
  it("tries two policies on one market, side by side, as the controller reckons them", async () => {
    const { context, page, problems } = await desk(browser, controller.url, controller.token);
    await visit(page, "markets");
    await page.getByRole("link", { name: "try policies" }).click();
    const b = page.getByRole("group", { name: "Policy B" });
    await b.getByLabel("Kind").selectOption("cheapest");
    await b.getByLabel("moves for a saving of").fill("5");
    await page.getByLabel("Days").fill("3");
    await page.getByLabel("A pool is taken once in").fill("12");
    const [request] = await Promise.all([page.waitForRequest("**/v1/simulations"), page.getByRole("button", { name: "Run both" }).click()]);
    expect(request.postDataJSON()).toMatchObject({ policies: [{ kind: "smart-spot" }, { kind: "cheapest", min_saving_permille: 50 }], days: 3, interruption_hours: 12 });
    await page.getByRole("heading", { name: /56 guests, 12 spot markets, 3 days/ }).waitFor({ timeout: 60_000 });
    // What is shown is what the controller answers to anybody who asks the same.
    const told = await rest.must("POST", "/v1/simulations", request.postDataJSON());
    const row = async (name: string) => (await page.getByRole("region", { name: "what came of it" }).locator("tbody tr", { hasText: name }).first().innerText()).split(/\s+/);
    const moves = await row("moves of its own");
    expect(moves.slice(-3)).toEqual([...told.outcomes, told.on_demand].map((one: { moves: number }) => String(one.moves)));
    expect((await row("paid")).slice(-1)[0]).toBe(`$${(told.on_demand.paid_nanousd / 1e9).toFixed(0)}`);
    expect(told.outcomes[0].availability).toBeLessThan(1);
    expect(await barriers(page)).toEqual([]);
    await shot(page, "simulator");
    // What is asked for beyond the bounds is said.
    expect(problems).toEqual([]);
    await page.getByLabel("moves for a saving of").first().fill("400");
    await page.locator("main form").evaluate((form: HTMLFormElement) => { form.noValidate = true; });
    await page.getByRole("button", { name: "Run both" }).click();
    await page.getByRole("alert").filter({ hasText: "min_saving_permille is 4000" }).waitFor();
    await context.close();
    for (const view of [VIEWS[1]!, VIEWS[2]!, VIEWS[3]!]) {
      const one = await desk(browser, controller.url, controller.token, view);
      await visit(one.page, "markets/simulator");
      await one.page.getByLabel("Days").fill("2");
      await one.page.getByRole("button", { name: "Run both" }).click();
      await one.page.getByRole("heading", { name: /56 guests/ }).waitFor({ timeout: 60_000 });
      expect(await sideways(one.page)).toBe(0);
      expect(await barriers(one.page)).toEqual([]);
      await shot(one.page, `simulator-${view.width}-${view.dark ? "dark" : "light"}`);
      await one.context.close();
    }
  });

  it("is given up when it is stopped, and is not for who only looks", async () => {
    const { context, page } = await desk(browser, controller.url, controller.token);
    await page.route("**/v1/simulations", () => undefined);
    await visit(page, "markets/simulator");
    await page.getByRole("button", { name: "Run both" }).click();
    await page.getByRole("button", { name: "Stop" }).click();
    await expect.poll(() => page.getByRole("button", { name: "Run both" }).isEnabled()).toBe(true);
    expect(await page.getByRole("alert").count()).toBe(0);
    await context.close();
    const { secret } = await rest.must("POST", "/v1/tokens", { name: "looks-at-markets", role: "viewer", project: web.project });
    const viewer = await desk(browser, controller.url, secret);
    await visit(viewer.page, "markets/simulator");
    await viewer.page.getByText("takes a role that may move guests").waitFor();
    expect((await rest.as(secret).send("POST", "/v1/simulations", { policies: [{ kind: "greedy" }] })).status).toBe(403);
    await viewer.context.close();
  });
});

describe("guests that could not leave in time", () => {
  it("are an alarm on the first screen, and the guest's page says why", async () => {
    const late = {
      guest: web.id, host: "hst-01a1fea9-e622-75ca-b41b-c7d245b5cc2f", host_name: "h2", destination: null, destination_name: null, state: "late",
      notice_ms: 120_000, leave_ms: 190_000, leave_with_all_ms: null, downtime_ms: 450, detail: "190 s at the 11 MiB/s that were measured between home and away",
    };
    // No host of a provider is here: both answers are set, as the controller would give them.
    expect((await rest.must("GET", "/v1/evacuations")).items).toEqual([]);
    for (const view of [VIEWS[0]!, VIEWS[3]!]) {
      const { context, page } = await desk(browser, controller.url, controller.token, view);
      await page.route("**/v1/evacuations?*", (route) => route.fulfill({ json: { items: [late] } }));
      await page.route(`**/v1/guests/${web.id}/evacuation`, (route) => route.fulfill({ json: late }));
      await page.route("**/v1/guests?*", async (route) => {
        const json = await (await route.fetch()).json();
        for (const one of json.items) one.state = "running";
        await route.fulfill({ json });
      });
      await visit(page, "");
      const alarm = page.getByRole("listitem").filter({ hasText: "could not leave h2 in time: 190 s at the 11 MiB/s" });
      await alarm.waitFor();
      await shot(page, `late-overview-${view.width}`);
      await alarm.getByRole("link", { name: "web" }).click();
      const panel = page.getByRole("region", { name: "Could it leave in time?" });
      await panel.getByText("not in time").waitFor();
      expect(await panel.innerText()).toMatch(/leaves in\s+3 min 10 s[\s\S]*with all of its host's guests\s+not known[\s\S]*no host takes it/);
      expect(await sideways(page)).toBe(0);
      expect(await barriers(page)).toEqual([]);
      await shot(page, `late-guest-${view.width}`);
      await context.close();
    }
  });
});

describe("a mirror", () => {
  it("tells how far the standby is, and has it take over only when somebody says that the host is dead", async () => {
    const operation = (await rest.must("GET", "/v1/operations?limit=1000")).items[0];
    let age = 300;
    const mirrored = () => ({
      ...operation, id: "opn-01a1fea9-e622-75ca-b41b-c7d245b5cc2f", kind: "guest_mirror", phase: "copy", guest: web.id, image: null, source: h1, destination: h2, ended_at_ms: null, error: null, is_cancel_requested: false,
      progress: { ...operation.progress, memory_total_bytes: 64 << 20, memory_remaining_bytes: 0, mirror: { cut: 43, committed: 42, committed_age_ms: (age += 100), pause_ms: 12, dirty_bytes: 3 << 20 } },
    });
    const begin = async (view = VIEWS[0]!) => {
      const found = await desk(browser, controller.url, controller.token, view);
      await found.page.route("**/v1/guests?*", async (route) => {
        const json = await (await route.fetch()).json();
        for (const one of json.items) Object.assign(one, { state: "running", operation: mirrored().id, host: h1, host_name: "h1" });
        await route.fulfill({ json });
      });
      await found.page.route("**/v1/operations?*", (route) => route.fulfill({ json: { items: [mirrored()] } }));
      await found.page.route("**/v1/operations/*", (route) => route.fulfill({ json: mirrored() }));
      await found.page.route("**/evacuation", (route) => route.fulfill({ status: 200, json: { guest: web.id, host: h1, host_name: "h1", state: "not_needed", notice_ms: 120_000, detail: "" } }));
      await found.page.route("**/mirrors?*", (route) => route.fulfill({ json: { items: [{ operation: mirrored().id, guest: web.id, source: h1, destination: h2, mode: "strict", interval_ms: 250, fencing: "lease", lease_ms: 15_000, lease_over_in_ms: 7000, source_silent_ms: 9000, is_protected: true, is_failing_over: false, standing: mirrored().progress.mirror }] } }));
      return found;
    };
    for (const view of VIEWS) {
      const { context, page, problems } = await begin(view);
      await visit(page, `guests/${web.id}`);
      const panel = page.getByRole("region", { name: "Mirror" });
      await panel.getByText("its standby could take over").waitFor();
      await panel.getByText("waits for the standby").waitFor();
      await panel.getByText("its standby takes over in").waitFor();
      expect(await panel.innerText()).toMatch(/fenced by a lease of\s+15 s\s+its host was heard\s+9\.0 s ago\s+its standby takes over in\s+7\.0 s/);
      expect(await panel.innerText()).toMatch(/whole at the standby\s+42[\s\S]*pause of the last cut\s+12 ms/);
      await panel.getByRole("img", { name: "how old the standby's copy is" }).waitFor({ timeout: 30_000 });
      expect(await sideways(page)).toBe(0);
      expect(await barriers(page)).toEqual([]);
      await shot(page, `mirror-${view.width}-${view.dark ? "dark" : "light"}`);
      expect(problems).toEqual([]);
      await context.close();
    }
    const { context, page } = await begin();
    await page.route("**/failover", (route) => route.fulfill({ status: 202, json: mirrored() }));
    await visit(page, `guests/${web.id}`);
    await page.getByRole("button", { name: "Take over…" }).click();
    const dialog = page.getByRole("dialog");
    expect(await dialog.getByRole("button", { name: "Take over now" }).isDisabled()).toBe(true);
    // In truth it has no mirror: the dry run says so, and nothing can be pressed.
    await dialog.getByRole("checkbox").check();
    await dialog.getByRole("alert").waitFor();
    expect(await dialog.getByRole("button", { name: "Take over now" }).isDisabled()).toBe(true);
    await dialog.getByRole("button", { name: "Close" }).click();
    await page.route("**/failover?dry_run=true", (route) => route.fulfill({ status: 200, json: mirrored() }));
    await page.getByRole("button", { name: "Take over…" }).click();
    await dialog.getByRole("checkbox").check();
    await dialog.getByText("it can be done now").waitFor();
    expect(await barriers(page)).toEqual([]);
    await shot(page, "mirror-take-over");
    const [request] = await Promise.all([page.waitForRequest("**/failover"), dialog.getByRole("button", { name: "Take over now" }).click()]);
    expect(request.postDataJSON()).toEqual({ host_is_dead: true });
    await dialog.waitFor({ state: "hidden" });
    await context.close();
  });

  it("is asked for as a dry run first", async () => {
    const { context, page } = await desk(browser, controller.url, controller.token);
    await page.route("**/v1/guests?*", async (route) => {
      const json = await (await route.fetch()).json();
      for (const one of json.items) one.state = "running";
      await route.fulfill({ json });
    });
    await visit(page, `guests/${web.id}`);
    await page.getByRole("button", { name: "Mirror…" }).click();
    await page.getByLabel("Where to").selectOption({ label: "home" });
    await page.getByLabel("A cut every").fill("0.5");
    await page.getByLabel("What it says to the network").selectOption("strict");
    const [request] = await Promise.all([page.waitForRequest("**/mirrors?dry_run=true"), page.getByRole("button", { name: "Check first" }).click()]);
    expect(request.postDataJSON()).toMatchObject({ interval_ms: 500, mode: "strict" });
    // It does not run in truth, and the controller says so.
    await page.getByRole("dialog").getByRole("alert").or(page.getByRole("dialog").locator(".bad")).first().waitFor();
    expect(await page.getByRole("button", { name: "Mirror now" }).count()).toBe(0);
    await shot(page, "mirror-ask");
    await context.close();
  });
});
