// A guest's serial console in its page.
import { Component } from "preact";
import { useEffect, useLayoutEffect, useRef, useState } from "preact/hooks";
import { ConsoleLine, type Standing } from "../api/console";
import type { Guest } from "../api/types";
import { may } from "../store/derive";
import { who } from "../store/store";
import { Panel } from "../ui/parts";
import { pasted, typed } from "./keys";
import { type Look, type Row, Screen } from "./screen";

function classes(look: Look, isCursor: boolean): string {
  const found: string[] = [];
  const bright = look.bold && look.fore >= 0 && look.fore < 8 ? 8 : 0;
  let [fore, back] = [look.fore + bright, look.back];
  if (look.inverse) {
    [fore, back] = [back, fore];
    if (fore < 0) found.push("dark");
    if (back < 0) found.push("lit");
  }
  if (fore >= 0) found.push(`f${fore}`);
  if (back >= 0) found.push(`b${back}`);
  if (look.bold) found.push("bold");
  if (look.faint) found.push("faint");
  if (look.underlined) found.push("underlined");
  if (isCursor) found.push("cursor");
  return found.join(" ");
}

interface LineProps { row: Row; version: number; cursor: number }

/** A row; drawn anew only when something in it changed. */
class Line extends Component<LineProps> {
  override shouldComponentUpdate(next: LineProps): boolean {
    return next.version !== this.props.version || next.cursor !== this.props.cursor;
  }

  override render({ row, cursor }: LineProps) {
    let last = row.cells.length;
    const blank = (at: number) => row.cells[at]!.sign === " " && row.cells[at]!.look.back < 0 && !row.cells[at]!.look.inverse;
    while (last > cursor + 1 && last > 0 && blank(last - 1)) last -= 1;
    const spans: { look: string; text: string }[] = [];
    for (let at = 0; at < last; at += 1) {
      const cell = row.cells[at]!;
      const look = classes(cell.look, at === cursor);
      const before = spans[spans.length - 1];
      if (before && before.look === look) before.text += cell.sign;
      else spans.push({ look, text: cell.sign });
    }
    return <div>{spans.map((span, at) => (span.look ? <span key={at} class={span.look}>{span.text}</span> : span.text))}{last === 0 && "\u200b"}</div>;
  }
}

const KEYS: [string, string][] = [["Esc", "\x1b"], ["Tab", "\t"], ["Ctrl-C", "\x03"], ["Ctrl-D", "\x04"], ["↑", "\x1b[A"], ["↓", "\x1b[B"]];

const TEXTS: Record<Standing, string> = {
  opening: "opening…", open: "open", following: "the guest is on its way: following it…", taken: "Somebody else opened this console: it is theirs now.", ended: "It is over.",
};

function Terminal(props: { guest: Guest; close: () => void }) {
  const { guest } = props;
  const [screen] = useState(() => new Screen());
  const [, draw] = useState(0);
  const [standing, setStanding] = useState<[Standing, string]>(["opening", ""]);
  const [run, setRun] = useState(0);
  const box = useRef<HTMLDivElement>(null);
  const field = useRef<HTMLTextAreaElement>(null);
  const leave = useRef<HTMLButtonElement>(null);
  const isAtEnd = useRef(true);
  const [line] = useState(() => {
    let frame = 0;
    return new ConsoleLine(guest.id, {
      onBytes(bytes) {
        screen.write(bytes);
        // However much it says: once for each picture.
        frame ||= requestAnimationFrame(() => {
          frame = 0;
          draw((count) => count + 1);
        });
      },
      onStanding: (now, why) => setStanding([now, why]),
    });
  });
  useEffect(() => {
    void line.run();
    field.current?.focus();
  }, [run]);
  useEffect(() => () => line.close(), []);
  useLayoutEffect(() => {
    if (box.current && isAtEnd.current) box.current.scrollTop = box.current.scrollHeight;
  });
  const [now, why] = standing;
  const isOver = now === "taken" || now === "ended";
  const type = (text: string) => {
    isAtEnd.current = true;
    line.type(text);
  };
  const press = (event: KeyboardEvent) => {
    if (event.isComposing) return;
    if (event.ctrlKey && event.key === "]") {
      event.preventDefault();
      leave.current?.focus();
      return;
    }
    const text = typed(event, screen.hasApplicationKeys);
    if (text === undefined) return;
    event.preventDefault();
    type(text);
  };
  const take = () => {
    const element = field.current;
    if (!element?.value) return;
    type(element.value.replaceAll("\n", "\r"));
    element.value = "";
  };
  const paste = (event: ClipboardEvent) => {
    event.preventDefault();
    type(pasted(event.clipboardData?.getData("text") ?? "", screen.hasBracketedPaste));
  };
  const cursor = screen.isCursorShown && now === "open" ? Math.min(screen.x, screen.columns - 1) : -1;
  return (
    <>
      <div class={`terminal ${now}`}>
        <div class="screen" ref={box} tabIndex={0} role="region" aria-label={`console of ${guest.name}`}
          onScroll={(event) => { const { scrollTop, scrollHeight, clientHeight } = event.currentTarget; isAtEnd.current = scrollHeight - scrollTop - clientHeight < 8; }}
          onMouseUp={() => { if (getSelection()?.isCollapsed !== false) field.current?.focus({ preventScroll: true }); }}>
          {screen.past.map((row) => <Line key={row.id} row={row} version={row.version} cursor={-1} />)}
          {screen.lines.map((row, at) => <Line key={row.id} row={row} version={row.version} cursor={at === screen.y ? cursor : -1} />)}
        </div>
        <textarea ref={field} aria-label={`type into the console of ${guest.name}`} autocapitalize="off" autocomplete="off" autocorrect="off" spellcheck={false} rows={1}
          onKeyDown={press} onInput={(event) => { if (!(event as InputEvent).isComposing) take(); }} onCompositionEnd={take} onPaste={paste} />
      </div>
      <div class="line small">
        <span role="status" class={isOver || now === "following" ? "warn" : "soft"}>{TEXTS[now]}{why ? ` (${why})` : ""}</span>
        <span class="grow" />
        {KEYS.map(([name, text]) => <button key={name} disabled={now !== "open"} onClick={() => { type(text); field.current?.focus(); }}>{name}</button>)}
        {isOver && <button class="main" onClick={() => setRun(run + 1)}>{now === "taken" ? "Take it back" : "Open it again"}</button>}
        <button ref={leave} onClick={props.close}>Close</button>
      </div>
      <p class="small soft">What you type goes to the guest, Tab too; <kbd>Ctrl ]</kbd> leaves it. It follows the guest when it moves. A console has one reader: the newest takes it.</p>
    </>
  );
}

export function ConsolePanel(props: { guest: Guest; begin: boolean }) {
  const [isOpen, setOpen] = useState(props.begin);
  if (!may(who.value, "change") || (props.guest.state !== "running" && !isOpen)) return null;
  return (
    <Panel title="Serial console" wide aside={isOpen ? undefined : <button onClick={() => setOpen(true)}>Open the console</button>}>
      {isOpen ? <Terminal guest={props.guest} close={() => setOpen(false)} /> : <p class="soft small">Whoever reads it now loses it to you.</p>}
    </Panel>
  );
}
