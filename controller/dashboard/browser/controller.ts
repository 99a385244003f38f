// A controller of its own for a test: the real program with its embedded store in a folder of its own.
import { type ChildProcess, spawn } from "node:child_process";
import { closeSync, existsSync, mkdirSync, mkdtempSync, openSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { generateKeyPairSync, sign } from "node:crypto";
import https from "node:https";
import { createServer } from "node:net";
import { tmpdir } from "node:os";
import { join } from "node:path";

function freePort(): Promise<number> {
  return new Promise((resolve, reject) => {
    const server = createServer();
    server.once("error", reject);
    server.listen(0, "127.0.0.1", () => {
      const { port } = server.address() as { port: number };
      server.close(() => resolve(port));
    });
  });
}

/** REST as a program uses it: with a token, over TLS that is checked against the controller's own CA. */
export class Rest {
  private readonly agent: https.Agent;

  constructor(readonly url: string, private readonly token: string, private readonly ca: Buffer) {
    this.agent = new https.Agent({ keepAlive: true, maxSockets: 16 });
  }

  as(token: string): Rest {
    return new Rest(this.url, token, this.ca);
  }

  /** The answer's status and, where it has one, its JSON. */
  send(method: string, path: string, body?: unknown): Promise<{ status: number; json: any }> {
    const raw = body instanceof Uint8Array;
    const data = body === undefined ? undefined : raw ? body : Buffer.from(JSON.stringify(body));
    const headers: Record<string, string> = { authorization: `Bearer ${this.token}` };
    if (data) {
      headers["content-type"] = raw ? "application/octet-stream" : "application/json";
      headers["content-length"] = String(data.byteLength);
    }
    return new Promise((resolve, reject) => {
      const request = https.request(this.url + path, { method, headers, ca: this.ca, agent: this.agent, timeout: 60_000 }, (response) => {
        const pieces: Buffer[] = [];
        response.on("data", (piece: Buffer) => pieces.push(piece));
        response.once("error", reject);
        response.once("end", () => {
          const text = Buffer.concat(pieces).toString();
          resolve({ status: response.statusCode ?? 0, json: text ? JSON.parse(text) : undefined });
        });
      });
      request.once("error", reject);
      request.once("timeout", () => request.destroy(new Error(`${method} ${path}: no answer in 60 s`)));
      request.end(data);
    });
  }

  async must<T = any>(method: string, path: string, body?: unknown): Promise<T> {
    const { status, json } = await this.send(method, path, body);
    if (status >= 300) throw new Error(`${method} ${path}: ${status} ${json?.detail ?? ""}`);
    return json as T;
  }

  /** Waits until an operation has ended, and says how. */
  async ended(operation: string): Promise<any> {
    for (let round = 0; round < 40; round += 1) {
      const found = await this.must("GET", `/v1/operations/${operation}?wait=30s`);
      if (["done", "failed", "rolled_back"].includes(found.phase)) return found;
    }
    throw new Error(`the operation ${operation} does not end`);
  }
}

export class Controller {
  private child: ChildProcess | undefined;

  private constructor(readonly folder: string, readonly url: string) {}

  static async start(): Promise<Controller> {
    // In memory where there is such a place: what is lost at a power cut is tested elsewhere, here thousands of guests are made.
    const folder = mkdtempSync(join(existsSync("/dev/shm") ? "/dev/shm" : tmpdir(), "supercloud-desk-"));
    mkdirSync(join(folder, "data"));
    const [rest, link] = [await freePort(), await freePort()];
    writeFileSync(join(folder, "controller.toml"), [
      `data_dir = "${join(folder, "data")}"`,
      `listen = "127.0.0.1:${rest}"`,
      `link_listen = "127.0.0.1:${link}"`,
      `names = ["localhost", "127.0.0.1"]`,
    ].join("\n"));
    const controller = new Controller(folder, `https://localhost:${rest}`);
    await controller.boot();
    return controller;
  }

  /** Starts the program (anew) and waits until it is ready. */
  async boot(): Promise<void> {
    const program = process.env.SUPERCLOUD_CONTROLLER;
    if (!program) throw new Error("SUPERCLOUD_CONTROLLER names the controller's program; ./deploy/test-desk sets it");
    const log = openSync(join(this.folder, "log"), "a");
    const child = spawn(program, ["--config", join(this.folder, "controller.toml")], { stdio: ["ignore", log, log] });
    closeSync(log);
    this.child = child;
    // A run that is interrupted leaves nothing behind.
    process.once("exit", () => child.kill("SIGKILL"));
    for (let round = 0; round < 600; round += 1) {
      if (child.exitCode !== null) throw new Error(`the controller ended:\n${this.log()}`);
      try {
        if ((await this.rest().send("GET", "/readyz")).status === 200) return;
      } catch {
        // Not yet.
      }
      await new Promise((resolve) => setTimeout(resolve, 100));
    }
    throw new Error(`the controller is not ready after a minute:\n${this.log()}`);
  }

  /** Ends it as a power cut would. */
  async kill(): Promise<void> {
    const child = this.child;
    if (!child || child.exitCode !== null || child.signalCode !== null) return;
    const gone = new Promise((resolve) => child.once("exit", resolve));
    child.kill("SIGKILL");
    await gone;
  }

  async remove(): Promise<void> {
    await this.kill();
    rmSync(this.folder, { recursive: true, force: true });
  }

  get token(): string {
    return readFileSync(join(this.folder, "data", "admin.token"), "utf8").trim();
  }

  get ca(): Buffer {
    return readFileSync(join(this.folder, "data", "ca.pem"));
  }

  rest(): Rest {
    return new Rest(this.url, this.token, this.ca);
  }

  private log(): string {
    return readFileSync(join(this.folder, "log"), "utf8").split("\n").slice(-20).join("\n");
  }
}

/** An image that has nothing on it, ready for guests that are never started. */
export async function emptyImage(rest: Rest, name: string): Promise<void> {
  await rest.must("POST", "/v1/images", { name });
  await rest.must("PUT", `/v1/images/${name}/parts/disk?offset=0`, new Uint8Array(1 << 20));
  const imported = await rest.ended((await rest.must("POST", `/v1/images/${name}/import`, { format: "raw" })).id);
  if (imported.phase !== "done") throw new Error(`the import ${imported.phase}: ${imported.error?.detail}`);
}

/** DER: a tag, a length, the parts. */
function der(tag: number, ...parts: Uint8Array[]): Buffer {
  const body = Buffer.concat(parts);
  const length = body.length < 0x80 ? [body.length] : body.length < 0x100 ? [0x81, body.length] : [0x82, body.length >> 8, body.length & 0xff];
  return Buffer.concat([Buffer.from([tag, ...length]), body]);
}

/** A host that has joined and whose agent was never heard of since. Its key is made here, as an agent makes its own. */
export async function silentHost(rest: Rest, name: string, cloud: string): Promise<string> {
  const { publicKey, privateKey } = generateKeyPairSync("ec", { namedCurve: "P-256" });
  // RFC 2986: version 0, no name, the key, no attributes; signed with ecdsa-with-SHA256 (1.2.840.10045.4.3.2).
  const asked = der(0x30, der(0x02, Buffer.from([0])), der(0x30), publicKey.export({ type: "spki", format: "der" }), der(0xa0));
  const how = der(0x30, der(0x06, Buffer.from([0x2a, 0x86, 0x48, 0xce, 0x3d, 0x04, 0x03, 0x02])));
  const csr = der(0x30, asked, how, der(0x03, Buffer.from([0]), sign("sha256", asked, privateKey)));
  const csr_pem = `-----BEGIN CERTIFICATE REQUEST-----\n${csr.toString("base64").match(/.{1,64}/g)!.join("\n")}\n-----END CERTIFICATE REQUEST-----\n`;
  const { token } = await rest.must("POST", "/v1/join-tokens", { host_name: name, cloud });
  return (await rest.must("POST", "/v1/join", { token, csr_pem })).host;
}
