"""The style of a report: light and dark as the reader's system has it, one column on a phone."""

from __future__ import annotations

STYLE = """
:root { color-scheme: light dark; --ink: light-dark(#1c2126, #e3e7eb); --paper: light-dark(#fff, #14181c);
  --quiet: light-dark(#59636e, #9aa5b1); --line: light-dark(#d5dae0, #343b43); --tint: light-dark(#f4f6f8, #1c2228);
  --link: light-dark(#0b57a4, #7db7f2); }
* { box-sizing: border-box; }
html { scroll-padding-top: 1rem; }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); max-width: 84rem;
  margin: 1.5rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; margin: 0 0 .5rem; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 2.4rem 0 .6rem; border-bottom: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 1.2rem 0 .4rem; overflow-wrap: anywhere; }
a { color: var(--link); }
:focus-visible { outline: 2px solid var(--link); outline-offset: 2px; }
.skip { position: absolute; left: -99rem; } .skip:focus { position: static; }
nav { display: flex; flex-wrap: wrap; gap: .2rem 1rem; margin-bottom: .8rem; }
.legend { display: flex; flex-wrap: wrap; gap: .2rem 1.2rem; border: 1px solid var(--line); border-radius: 6px;
  margin: 0; padding: .3rem .8rem .5rem; }
.legend label { display: inline-flex; align-items: center; gap: .4rem; min-height: 1.9rem; overflow-wrap: anywhere; }
.legend input { width: 1.1rem; height: 1.1rem; }
.key { display: inline-block; width: 1.6rem; vertical-align: middle; margin-right: .35rem; flex: none; }
.note { color: var(--quiet); font-size: .85rem; font-weight: 400; }
.grid { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 22rem), 1fr)); gap: 1rem; }
figure { margin: 0; padding: .6rem; border: 1px solid var(--line); border-radius: 6px; min-width: 0; max-width: 40rem; }
figcaption { line-height: 1.3; margin-bottom: .3rem; overflow-wrap: anywhere; }
svg { display: block; width: 100%; height: auto; color: var(--ink); stroke-linejoin: round; }
svg text { font-family: system-ui, sans-serif; }
dl { display: grid; grid-template-columns: 1fr auto; gap: 0 .8rem; margin: .3rem 0; font-size: .85rem; }
dd { margin: 0; text-align: right; font-variant-numeric: tabular-nums; } dt { overflow-wrap: anywhere; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; margin: .4rem 0; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .5rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap;
  vertical-align: top; }
th:first-child, td:first-child, .words { text-align: left; }
thead th { color: var(--quiet); font-size: .85rem; font-weight: 600; } tbody th { font-weight: 500; }
td.text, pre.text { white-space: pre-wrap; overflow-wrap: anywhere; text-align: left;
  font: .8rem/1.45 ui-monospace, monospace; }
td.words { white-space: normal; min-width: 15rem; }
td.text { min-width: 16rem; max-width: 44rem; }
pre { overflow-x: auto; font-size: .8rem; background: var(--tint); padding: .5rem .7rem; margin: 0;
  border-radius: 6px; }
details { margin: .3rem 0; } details.run > details { margin-left: 1rem; }
summary { cursor: pointer; padding: .2rem 0; overflow-wrap: anywhere; }
.prompt { margin: .8rem 0 .2rem; }
.up { color: light-dark(#15703f, #5fcf8f); font-weight: 600; }
.down { color: light-dark(#b3261e, #ff8a80); font-weight: 600; }
@media print { details > * { display: block; } nav, .legend { display: none; } }
"""
