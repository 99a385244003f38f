// Search over all that is known: `/` opens it.
import { useEffect, useRef, useState } from "preact/hooks";
import { go } from "../router";
import { clouds, guests, hosts, images, networks } from "../store/store";

interface Hit { text: string; kind: string; path: string }

const PAGES: Hit[] = ["", "guests", "hosts", "operations", "plans", "markets", "markets/simulator", "costs", "images", "networks", "events", "tokens", "wall"].map((path) => ({ text: path || "overview", kind: "page", path: `/${path}` }));

export function find(words: string): Hit[] {
  const low = words.trim().toLowerCase();
  if (!low) return PAGES;
  const hits: Hit[] = [];
  for (const guest of guests.value.values()) hits.push({ text: `${guest.name} ${guest.ipv4 ?? ""}`, kind: "guest", path: `/guests/${guest.id}` });
  for (const host of hosts.value.values()) hits.push({ text: host.name, kind: `host in ${host.cloud_name}`, path: `/hosts/${host.name}` });
  for (const image of images.value.values()) hits.push({ text: image.name, kind: "image", path: "/images" });
  for (const network of networks.value.values()) hits.push({ text: network.name, kind: "network", path: "/networks" });
  for (const cloud of clouds.value.values()) hits.push({ text: cloud.name, kind: "cloud", path: "/hosts" });
  return [...hits, ...PAGES].filter((hit) => hit.text.toLowerCase().includes(low) || hit.path.includes(low)).slice(0, 12);
}

export function Search() {
  const dialog = useRef<HTMLDialogElement>(null);
  const [words, setWords] = useState("");
  const [at, setAt] = useState(0);
  useEffect(() => {
    const press = (event: KeyboardEvent) => {
      const element = event.target as HTMLElement;
      if (event.key !== "/" || event.ctrlKey || event.metaKey || /^(INPUT|TEXTAREA|SELECT)$/.test(element.tagName)) return;
      event.preventDefault();
      setWords("");
      setAt(0);
      dialog.current?.showModal();
    };
    addEventListener("keydown", press);
    return () => removeEventListener("keydown", press);
  }, []);
  const hits = find(words);
  const take = (hit: Hit | undefined) => {
    if (!hit) return;
    dialog.current?.close();
    go(hit.path);
  };
  const step = (event: KeyboardEvent) => {
    if (event.key === "ArrowDown") setAt(Math.min(hits.length - 1, at + 1));
    else if (event.key === "ArrowUp") setAt(Math.max(0, at - 1));
    else if (event.key === "Enter") take(hits[at]);
    else return;
    event.preventDefault();
  };
  return (
    <>
      <button class="plain" aria-label="search" onClick={() => { setWords(""); setAt(0); dialog.current?.showModal(); }}>Search <kbd>/</kbd></button>
      <dialog class="search" ref={dialog} aria-label="search">
        <input type="search" aria-label="search guests, hosts, images, networks, pages" placeholder="guest, host, address, page" value={words} autofocus
          onInput={(event) => { setWords(event.currentTarget.value); setAt(0); }} onKeyDown={step} />
        <ul class="plain">
          {hits.map((hit, index) => <li key={hit.kind + hit.path + hit.text} class={index === at ? "here" : ""}><button class="plain" onClick={() => take(hit)}>{hit.text} <small>{hit.kind}</small></button></li>)}
          {hits.length === 0 && <li>nothing found</li>}
        </ul>
      </dialog>
    </>
  );
}
