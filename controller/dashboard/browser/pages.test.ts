// Pages for what needs hosts, and hosts are elsewhere: what only an agent would tell is set, all else is the real controller's.
import type { Browser } from "playwright-core";
import { afterAll, beforeAll, describe, expect, it } from "vitest";
import { Controller, Rest, emptyImage } from "./controller";
import { VIEWS, barriers, desk, open, shot, sideways, visit } from "./look";
import { Serial } from "./serial";

let browser: Browser;
let controller: Controller;
let rest: Rest;
let web: { id: string; name: string; project: string };

beforeAll(async () => {
  [browser, controller] = await Promise.all([open(), Controller.start()]);
  rest = controller.rest();
  await emptyImage(rest, "blank");
  await rest.must("POST", "/v1/clouds", { name: "home" });
  await rest.must("POST", "/v1/networks", { name: "office", cidr: "10.20.0.0/24" });
  const shape = { vcpus: 1, memory_bytes: 64 << 20 };
  await rest.must("POST", "/v1/guests", { name: "web", image: "blank", network: "office", shape, start: false });
  web = (await rest.must("GET", "/v1/guests")).items[0];
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
