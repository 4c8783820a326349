"""The style sheet of the page; nothing else."""

__all__ = ["STYLE"]

STYLE = """
:root { color-scheme: light; --ink: #1c2733; --muted: #5f6b7a; --rule: #e4e8ed; --accent: #d55e00; }
* { box-sizing: border-box; }
body { margin: 0; background: #f6f7f9; color: var(--ink); font: 15px/1.55 system-ui, -apple-system, "Segoe UI", Roboto,
  "Helvetica Neue", Arial, "Liberation Sans", sans-serif; -webkit-font-smoothing: antialiased; }
main { max-width: 1120px; margin: 0 auto; padding: 48px 28px 72px; }
header { margin-bottom: 36px; }
.eyebrow { margin: 0 0 6px; color: var(--muted); font-size: 13px; letter-spacing: .04em; }
h1 { margin: 0 0 14px; font-size: 34px; line-height: 1.15; font-weight: 650; letter-spacing: -.015em; }
h2 { margin: 0 0 6px; font-size: 19px; line-height: 1.3; font-weight: 650; letter-spacing: -.005em; }
h3 { margin: 0 0 8px; font-size: 13px; font-weight: 600; color: var(--muted); }
.lead { margin: 0 0 26px; max-width: 46em; font-size: 18px; line-height: 1.5; color: #36424f; }
.caption { margin: 0 0 14px; max-width: 60em; color: var(--muted); font-size: 14px; }
section { margin: 0 0 22px; padding: 24px 26px 22px; background: #fff; border: 1px solid var(--rule);
  border-radius: 10px; }
.figure { width: 100%; }
dl, dd { margin: 0; }
.tiles { display: grid; grid-template-columns: repeat(4, 1fr); gap: 14px; }
.tile { padding: 16px 18px 14px; background: #fff; border: 1px solid var(--rule); border-radius: 10px; }
.tile dt { color: var(--muted); font-size: 13px; }
.tile dd { font-size: 27px; line-height: 1.25; font-weight: 600; letter-spacing: -.01em;
  font-variant-numeric: tabular-nums; }
.tile .note { font-size: 13px; line-height: 1.4; font-weight: 400; letter-spacing: 0; color: var(--muted); }
.tile:first-child { border-top: 3px solid var(--accent); padding-top: 14px; }
.scroll { overflow-x: auto; }
table { width: 100%; border-collapse: collapse; font-size: 14px; font-variant-numeric: tabular-nums; }
table.narrow { width: auto; min-width: 420px; margin-top: 18px; }
th { padding: 6px 12px 6px 0; border-bottom: 1px solid #c9d1da; text-align: left; font-weight: 500; font-size: 13px;
  color: var(--muted); vertical-align: bottom; white-space: nowrap; }
td { padding: 7px 12px 7px 0; border-bottom: 1px solid var(--rule); vertical-align: top; overflow-wrap: anywhere; }
tbody tr:last-child td { border-bottom: 0; }
th:last-child, td:last-child { padding-right: 0; }
.number { text-align: right; white-space: nowrap; }
.number + :not(.number) { padding-left: 18px; }
tr.picked td { font-weight: 600; }
tr.picked td:first-child { box-shadow: inset 3px 0 var(--accent); padding-left: 10px; }
td small { display: block; color: var(--muted); font-size: 12px; line-height: 1.4; }
.findings { display: grid; grid-template-columns: 1fr 1fr; gap: 16px 36px; margin-top: 22px; padding-top: 20px;
  border-top: 1px solid var(--rule); }
.findings dt { font-weight: 600; font-size: 14px; }
.findings dd { font-size: 14px; color: #36424f; }
.words { margin: 10px 0 0; padding-left: 20px; max-width: 62em; }
.words li { margin: 4px 0; }
.absent { margin: 18px 0 0; padding: 12px 16px 12px 32px; background: #fff8ee; border-radius: 8px; font-size: 14px; }
code { font: .92em ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; }
.settings { display: grid; grid-template-columns: repeat(auto-fit, minmax(280px, 1fr)); gap: 24px 40px;
  margin-top: 10px; }
.settings dl { display: grid; grid-template-columns: max-content 1fr; gap: 3px 16px; font-size: 13px;
  font-variant-numeric: tabular-nums; }
.settings dt { color: var(--muted); }
.settings dd { overflow-wrap: anywhere; }
@media (max-width: 760px) { .tiles, .findings { grid-template-columns: 1fr 1fr; } main { padding: 28px 14px; } }
@media print { body { background: #fff; } section, .tile { break-inside: avoid; } }
"""
