// A controller with a guest whose console can be looked at, where no host is: a door before the real controller that answers for one
// guest's console itself, as `controller/src/rest/guest_console.rs` does, and lets everything else through.
import http from "node:http";
import https from "node:https";

/** The shell behind the console: what is typed is echoed, and a line is answered in capitals. */
export class Serial {
  /** What was typed, all of it. */
  typed = "";
  said = "";
  private number = 100;
  private reader: http.ServerResponse | undefined;
  private line = "";
  private server: http.Server | undefined;
  /** Set: the guest runs nowhere. */
  isAway = false;

  constructor(private readonly controller: string, private readonly ca: Buffer, private readonly token: string, private readonly guest: string) {}

  /** Opens the door, without TLS: whoever comes through it is signed in with the token. */
  async start(): Promise<string> {
    const agent = new https.Agent({ keepAlive: true });
    const server = http.createServer((request, response) => {
      const at = `/v1/guests/${this.guest}/console`;
      if (request.url === at) return this.open(response);
      if (request.url?.startsWith(`${at}/`)) return this.input(request, response);
      const onward = https.request(this.controller + request.url, { method: request.method, headers: { ...request.headers, authorization: `Bearer ${this.token}` }, ca: this.ca, agent }, (answer) => {
        response.writeHead(answer.statusCode ?? 502, answer.headers);
        answer.pipe(response);
      });
      onward.once("error", () => response.destroy());
      response.once("close", () => onward.destroy());
      request.pipe(onward);
    });
    await new Promise<void>((resolve) => server.listen(0, "127.0.0.1", resolve));
    this.server = server;
    return `http://localhost:${(server.address() as { port: number }).port}`;
  }

  stop(): void {
    this.server?.closeAllConnections();
    this.server?.close();
  }

  private open(response: http.ServerResponse): void {
    if (this.isAway) {
      response.writeHead(409, { "content-type": "application/problem+json" });
      response.end(JSON.stringify({ status: 409, code: "wrong_state", title: "wrong state", detail: "the guest runs nowhere: it has no console" }));
      return;
    }
    this.end("another console of the guest was opened");
    this.number += 1;
    response.writeHead(200, { "content-type": "application/octet-stream", "supercloud-console": String(this.number) });
    // What it said before comes first, as from the host's log.
    response.write(this.said.slice(-8192));
    this.reader = response;
  }

  say(text: string): void {
    this.said += text;
    this.reader?.write(text);
  }

  /** Ends the reader's console as the agent does. */
  end(why: string): void {
    this.reader?.end(`\r\n[${why}]\r\n`);
    this.reader = undefined;
  }

  private input(request: http.IncomingMessage, response: http.ServerResponse): void {
    const pieces: Buffer[] = [];
    request.on("data", (piece: Buffer) => pieces.push(piece));
    request.once("end", () => {
      const isOurs = request.url!.endsWith(`/${this.number}/input`) && request.headers["x-supercloud-csrf"] === "1";
      response.writeHead(isOurs ? 204 : 409).end();
      if (!isOurs) return;
      const text = Buffer.from(JSON.parse(Buffer.concat(pieces).toString()).data, "base64").toString();
      this.typed += text;
      for (const sign of text) this.press(sign);
    });
  }

  private press(sign: string): void {
    if (sign === "\r") {
      this.say(`\r\n\x1b[1;32m${this.line.toUpperCase()}\x1b[0m\r\n# `);
      this.line = "";
    } else if (sign === "\x7f") {
      if (this.line) this.say("\b \b");
      this.line = this.line.slice(0, -1);
    } else if (sign >= " ") {
      this.line += sign;
      this.say(sign);
    }
  }
}
