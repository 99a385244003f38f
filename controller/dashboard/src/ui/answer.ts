// What one endpoint tells, asked for by the page that shows it.
import { useEffect, useState } from "preact/hooks";
import { Refused, get } from "../api/http";

export interface Known<T> { path: string; value?: T; problem: string; isNone: boolean }

/** After a refusal: that there is no such thing ends what was known of it, any other refusal (too many ask) keeps it. */
export function refused<T>(before: Known<T>, path: string, problem: { status: number; code: string; detail: string }): Known<T> {
  const isNone = problem.status === 404 || problem.code === "wrong_state";
  const isKept = !isNone && before.path === path && before.value !== undefined;
  return { path, ...(isKept ? { value: before.value! } : {}), problem: problem.detail, isNone };
}

export interface Answer<T> { value: T | undefined; problem: string; isNone: boolean; again: () => void }

/** Asks when the page comes, when `key` changes, when told to and, with `everyMs`, again and again. `isNone`: there is no such thing. */
export function useAnswer<T>(path: string, key = "", everyMs = 0): Answer<T> {
  const [state, setState] = useState<Known<T>>({ path: "", problem: "", isNone: false });
  const [round, setRound] = useState(0);
  useEffect(() => {
    let isHere = true;
    const ask = async () => {
      try {
        const value = await get<T>(path);
        if (isHere) setState({ path, value, problem: "", isNone: false });
      } catch (error) {
        // That the controller is away is told elsewhere; what was shown stays.
        if (isHere && error instanceof Refused) setState((before) => refused(before, path, error.problem));
      }
    };
    void ask();
    const timer = everyMs > 0 ? setInterval(() => void ask(), everyMs) : undefined;
    return () => {
      isHere = false;
      clearInterval(timer);
    };
  }, [path, key, everyMs, round]);
  const isIts = state.path === path;
  return { value: isIts ? state.value : undefined, problem: isIts ? state.problem : "", isNone: isIts && state.isNone, again: () => setRound((before) => before + 1) };
}
