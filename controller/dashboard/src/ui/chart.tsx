// Series over time, by uPlot; redrawn when the data or the colours change.
import { useEffect, useRef } from "preact/hooks";
import uPlot from "uplot";
import { theme } from "./theme";

export interface Series { name: string; values: (number | null)[]; strong?: boolean; dashed?: boolean }

const TONES = ["--s1", "--s2", "--s3", "--s4", "--s5", "--s6"];

export function Chart(props: { label: string; x: number[]; series: Series[]; stepped?: boolean; y: (value: number) => string; xText: (value: number) => string; height?: number }) {
  const box = useRef<HTMLDivElement>(null);
  const plot = useRef<uPlot>();
  const shape = props.series.map((one) => `${one.name}${one.strong ? "!" : ""}${one.dashed ? "-" : ""}`).join("|");
  const data = [props.x, ...props.series.map((one) => one.values)] as uPlot.AlignedData;
  const tint = theme.value;
  const newest = useRef(props);
  newest.current = props;
  useEffect(() => {
    const element = box.current;
    if (!element) return;
    const style = getComputedStyle(document.documentElement);
    const tone = (name: string) => style.getPropertyValue(name).trim();
    const paths = props.stepped ? uPlot.paths.stepped!({ align: 1 }) : undefined;
    const axis = { stroke: tone("--soft"), grid: { stroke: tone("--line"), width: 1 }, ticks: { stroke: tone("--line"), width: 1 }, font: "12px system-ui" };
    plot.current = new uPlot(
      {
        width: Math.max(200, element.clientWidth),
        height: props.height ?? 220,
        scales: { x: { time: false } },
        cursor: { y: false },
        axes: [
          { ...axis, values: (_plot, ticks) => ticks.map((tick) => newest.current.xText(tick)), space: 120 },
          { ...axis, values: (_plot, ticks) => ticks.map((tick) => newest.current.y(tick)), size: 84 },
        ],
        series: [
          { label: "at", value: (_plot, value) => (value === null ? "–" : newest.current.xText(value)) },
          ...props.series.map((one, at) => ({
            label: one.name,
            stroke: tone(TONES[at % TONES.length]!),
            width: one.strong ? 3 : 1.5,
            dash: one.dashed ? [6, 4] : undefined,
            paths,
            points: { show: false },
            value: (_plot: uPlot, value: number | null) => (value === null ? "–" : newest.current.y(value)),
          })),
        ],
      },
      data,
      element,
    );
    const observer = new ResizeObserver(() => plot.current?.setSize({ width: Math.max(200, element.clientWidth), height: props.height ?? 220 }));
    observer.observe(element);
    return () => {
      observer.disconnect();
      plot.current?.destroy();
    };
  }, [shape, tint]);
  useEffect(() => {
    plot.current?.setData(data);
  });
  return <div class="chart" role="img" aria-label={props.label} ref={box} />;
}
