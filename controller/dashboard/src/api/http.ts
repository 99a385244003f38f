// Requests to the controller: the session is in a cookie, changes carry the header that foreign pages cannot send.
import { signal } from "@preact/signals";
import type { Problem } from "./types";

/** When the controller last answered anything, by this machine's clock; 0: never. */
export const heard = signal(0);

export class Refused extends Error {
  constructor(readonly problem: Problem) {
    super(problem.detail);
  }
}

/** The controller cannot be reached, or answered with something that is not its own. */
export class Away extends Error {}

const CSRF = { "x-supercloud-csrf": "1" };

async function send(method: string, path: string, body: unknown, headers: Record<string, string>, signal = AbortSignal.timeout(60_000)): Promise<Response> {
  let response: Response;
  try {
    response = await fetch(path, {
      method,
      credentials: "same-origin",
      headers: { ...headers, ...(body === undefined ? {} : { "content-type": "application/json" }) },
      body: body === undefined ? undefined : JSON.stringify(body),
      signal,
    });
  } catch (error) {
    throw new Away(`the controller does not answer (${String(error)})`);
  }
  if (response.ok) {
    heard.value = Date.now();
    return response;
  }
  let problem: Problem;
  try {
    problem = (await response.json()) as Problem;
  } catch {
    throw new Away(`the controller answered ${response.status} without saying why`);
  }
  throw new Refused(problem);
}

export async function get<T>(path: string): Promise<T> {
  return (await send("GET", path, undefined, {})).json() as Promise<T>;
}

/** All pages of a listing. */
export async function list<T>(path: string): Promise<T[]> {
  const items: T[] = [];
  let page = "";
  do {
    const mark = path.includes("?") ? "&" : "?";
    const part = await get<{ items: T[]; next_page?: string | null }>(`${path}${mark}limit=1000${page}`);
    items.push(...part.items);
    page = part.next_page ? `&page=${encodeURIComponent(part.next_page)}` : "";
  } while (page);
  return items;
}

/** A change. Where no answer comes it is sent again with the same key: then it is done once, however often it arrives. */
export async function change<T>(method: "POST" | "PUT" | "PATCH" | "DELETE", path: string, body?: unknown): Promise<T | undefined> {
  const headers = { ...CSRF, "idempotency-key": crypto.randomUUID() };
  let response: Response;
  for (let left = 3; ; left -= 1) {
    try {
      response = await send(method, path, body, headers);
      break;
    } catch (error) {
      // Nobody knows whether it was done, or the store was busy: with the same key it is done once.
      const isPassing = error instanceof Away || (error instanceof Refused && error.problem.retryable && error.problem.status === 503);
      if (!isPassing || left <= 1) throw error;
      await new Promise((resolve) => setTimeout(resolve, 1000));
    }
  }
  return response.status === 204 ? undefined : ((await response.json()) as T);
}

/** A request that is not sent again, for as long as `signal` lets it. */
export function once(method: "GET" | "POST", path: string, body: unknown, signal: AbortSignal): Promise<Response> {
  return send(method, path, body, method === "GET" ? {} : CSRF, signal);
}

export async function signIn<T>(token: string): Promise<T> {
  return (await send("POST", "/v1/session", undefined, { authorization: `Bearer ${token}` })).json() as Promise<T>;
}

export async function signOut(): Promise<void> {
  await send("DELETE", "/v1/session", undefined, CSRF);
}
