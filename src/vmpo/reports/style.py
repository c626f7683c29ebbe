"""The style sheet of the report: one column of text, figures in a grid, light and dark, down to a phone's width."""

from __future__ import annotations

CSS = """
:root {
  color-scheme: light dark;
  --paper: #fafaf8; --card: #ffffff; --ink: #24282e; --faint: #676d76; --line: #e4e4df;
  --base: #878d97; --aligned: #2465a8; --truth: #b3741a; --good: #1f7a44; --bad: #b83a2c; --bad-soft: #b83a2c1f;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #131518; --card: #1b1e22; --ink: #e4e4e0; --faint: #9aa0a8; --line: #2e3237;
    --base: #8d949e; --aligned: #6fb0f0; --truth: #e0a64c; --good: #6cc592; --bad: #ee7a6c; --bad-soft: #ee7a6c2e;
  }
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body {
  margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
}
main { max-width: 1080px; margin: 0 auto; padding: 48px 24px 72px; }
h1, h2 {
  font-family: Charter, "Iowan Old Style", "Palatino Linotype", Georgia, serif; font-weight: 600;
  line-height: 1.2;
}
h1 { font-size: clamp(1.7rem, 4.6vw, 2.6rem); margin: 6px 0 12px; max-width: 24em; text-wrap: balance; }
h2 { font-size: 1.4rem; margin: 60px 0 6px; padding-top: 22px; border-top: 1px solid var(--line); }
h3 { font-size: .95rem; font-weight: 600; margin: 26px 0 8px; }
p { margin: 0 0 12px; max-width: 44em; }
.over { color: var(--faint); font-size: .85rem; margin: 0; overflow-wrap: anywhere; }
.lead { font-size: 1.08rem; color: var(--faint); }
.quiet { color: var(--faint); font-size: .9rem; }
.note {
  border-left: 3px solid var(--truth); padding: 6px 0 6px 14px; margin: 0 0 12px; font-size: .94rem;
  max-width: 46em;
}
.num { font-variant-numeric: tabular-nums; white-space: nowrap; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(190px, 1fr)); gap: 12px; margin: 28px 0 0; }
.tile { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 14px 16px 12px; }
.tile b {
  display: block; font-size: 1.45rem; font-weight: 600; line-height: 1.25; font-variant-numeric: tabular-nums;
}
.tile b small { font-size: .62em; font-weight: 500; color: var(--faint); white-space: nowrap; }
.tile span { color: var(--faint); font-size: .84rem; display: block; line-height: 1.4; }
.key {
  display: flex; flex-wrap: wrap; gap: 4px 18px; font-size: .86rem; color: var(--faint); margin: 0 0 14px;
  padding: 0; list-style: none;
}
.key i { display: inline-block; width: 11px; height: 11px; border-radius: 2px; margin-right: 6px; }
.pairs { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 300px), 1fr)); gap: 12px; }
.pair {
  margin: 0; background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 10px 12px 9px;
  min-width: 0;
}
.pair figcaption {
  font-size: .84rem; color: var(--faint); margin-bottom: 7px; overflow: hidden; text-overflow: ellipsis;
  white-space: nowrap;
}
.pair figcaption b { color: var(--ink); letter-spacing: .04em; }
.two { display: grid; grid-template-columns: 1fr 1fr; gap: 18px; }
.two > div { min-width: 0; }
.two .who { font-size: .74rem; color: var(--faint); display: block; margin-bottom: 2px; }
.two img, .strip img { display: block; width: 100%; height: auto; border-radius: 3px; }
img.pixel { image-rendering: pixelated; }
.gone {
  aspect-ratio: 8 / 3; border: 1px dashed var(--line); border-radius: 3px; display: grid; place-items: center;
  font-size: .74rem; color: var(--faint);
}
.read {
  font: 600 .86rem/1.5 ui-monospace, "SF Mono", Menlo, Consolas, monospace; letter-spacing: .06em;
  margin-top: 4px; overflow-wrap: anywhere;
}
.read.right { color: var(--good); }
.read .wrong {
  color: var(--bad); background: var(--bad-soft); border-radius: 2px; text-decoration: underline;
  text-underline-offset: 3px;
}
.read .score { color: var(--faint); font-weight: 400; letter-spacing: 0; float: right; }
.strip { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 240px), 1fr)); gap: 12px; }
.strip figure { margin: 0; font-size: .78rem; color: var(--faint); overflow-wrap: anywhere; }
.panels { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 320px), 1fr)); gap: 14px; }
.panel {
  margin: 0; background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 12px 14px 8px;
  min-width: 0;
}
.panel figcaption { font-size: .9rem; font-weight: 600; line-height: 1.35; margin-bottom: 6px; }
.panel figcaption span { display: block; font-weight: 400; font-size: .8rem; color: var(--faint); }
.panel img { display: block; width: 100%; height: auto; }
.wide { max-width: 700px; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .93rem; }
th, td { text-align: right; padding: 9px 10px; border-bottom: 1px solid var(--line); vertical-align: top; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
thead th { font-size: .8rem; color: var(--faint); font-weight: 600; vertical-align: bottom; }
tbody th { font-weight: 500; }
td { font-variant-numeric: tabular-nums; }
td .se { color: var(--faint); font-size: .84em; white-space: nowrap; }
td .gain { font-weight: 650; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 4px 20px; font-size: .9rem; margin: 0; }
dt { color: var(--faint); }
dd { margin: 0; overflow-wrap: anywhere; }
details { margin-top: 14px; }
summary { cursor: pointer; color: var(--aligned); font-size: .92rem; margin-bottom: 12px; }
pre {
  background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 14px 16px;
  overflow-x: auto; font: .8rem/1.5 ui-monospace, "SF Mono", Menlo, Consolas, monospace;
}
@media (max-width: 560px) {
  main { padding: 28px 16px 48px; }
  h2 { margin-top: 40px; }
  .tiles { grid-template-columns: 1fr 1fr; gap: 10px; }
  .tile { padding: 11px 12px 10px; }
  .tile b { font-size: 1.18rem; }
  th, td { padding: 8px 5px; font-size: .85rem; }
  td .se { display: block; }
  .panel { padding: 10px 10px 6px; }
  dl { grid-template-columns: 1fr; gap: 0; }
  dd { margin-bottom: 8px; }
}
@media print { body { background: none; } .pair, .panel, .tile { break-inside: avoid; } }
""".strip()
