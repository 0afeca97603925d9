"use strict";
// Tables of a hundred thousand rows, of which those in sight are in the page; and what is drawn of pairs.
// Data come as scripts (bsc.put, bsc.words, bsc.pair), since a page of the file system may load nothing else.
const bsc = { coders: {}, contexts: {}, pairs: [] };
bsc.put = (slug, table) => { bsc.coders[slug] = table; };
bsc.words = (slug, texts) => { bsc.contexts[slug] = texts; };
bsc.pair = (pair) => { bsc.pairs.push(pair); };

(() => {
  const ROW = 28;
  const make = (tag, text, properties) => Object.assign(document.createElement(tag), text === undefined ? {} : { textContent: text }, properties || {});
  const place = (latent) => `${Math.floor(latent / 1000)}/${latent}.html`;

  const shown = {
    count: (v) => v.toLocaleString("en"),
    percent: (v) => (100 * v).toFixed(v >= 0.1 ? 1 : 3) + " %",
    number: (v) => Math.abs(v) >= 1000 ? v.toPrecision(4) : v.toFixed(3),
    words: (v) => v,
    latent: (v) => String(v),
  };

  // What a filter lets through: "0.1-0.5", ">3", "<= 0.2", "7"; null where it cannot be read. A number
  // is what is shown as that number, so its last digit says how near.
  const range = (text, kind) => {
    const unit = kind === "percent" ? 0.01 : 1;
    const t = text.replace(/[%\s]/g, "").replace(/,(?=\d{3}(?!\d))/g, "").replace("..", "-");
    if (!t) return () => true;
    if (t.includes(",")) return null;
    let m = /^(>=?|<=?)(-?[\d.]+(?:e-?\d+)?)$/i.exec(t);
    if (m) {
      const bound = Number(m[2]) * unit;
      return { ">": (v) => v > bound, ">=": (v) => v >= bound, "<": (v) => v < bound, "<=": (v) => v <= bound }[m[1]];
    }
    m = /^(-?[\d.]+(?:e-?\d+)?)(?:-(-?[\d.]+(?:e-?\d+)?))?$/i.exec(t);
    if (!m || Number.isNaN(Number(m[1]))) return null;
    const low = Number(m[1]) * unit, high = (m[2] === undefined ? Number(m[1]) : Number(m[2])) * unit;
    if (low > high) return null;
    const digits = Math.max(...[m[1], m[2] || ""].map((x) => (x.split(".")[1] || "").length));
    const near = digits || kind === "percent" ? 0.5 * unit * 10 ** -digits : 1e-9;
    return (v) => v >= low - near && v <= high + near;
  };

  const state = () => new URLSearchParams(location.hash.slice(1));
  const keep = (changes) => {
    const now = state();
    for (const [key, value] of Object.entries(changes)) value === "" || value === null ? now.delete(key) : now.set(key, value);
    const text = now.toString();
    history.replaceState(null, "", text ? `#${text}` : location.pathname + location.search);
  };

  // columns: {name, title, kind, at(row)}; n: rows; text(row): what a search looks through.
  bsc.table = (root, columns, n, { text, chosen, first = { name: columns[0].name, down: false } }) => {
    const box = root.querySelector(".rows"), table = make("table");
    const head = make("thead"), body = make("tbody"), names = make("tr"), filters = make("tr");
    const search = document.querySelector("#tools input[type=search]"), count = document.querySelector("#tools output");
    let order = [], selected = -1, sort = state().get("sort") || first.name, down = state().has("sort") ? state().get("down") === "1" : first.down;
    const tests = new Map();
    if (root.stop) root.stop.abort(); // what the table before it listened to
    root.stop = new AbortController();
    const { signal } = root.stop;

    for (const column of columns) {
      const cell = make("th", undefined, { className: column.kind === "words" ? "left" : "" });
      const button = make("button", column.title, { type: "button" });
      button.addEventListener("click", () => {
        down = sort === column.name ? !down : column.kind !== "words" && column.kind !== "latent";
        sort = column.name;
        keep({ sort, down: down ? "1" : "" });
        refresh();
      });
      cell.append(button);
      names.append(cell);
      const field = make("th");
      if (column.kind !== "words") {
        const input = make("input", undefined, { type: "text", value: state().get(`in.${column.name}`) || "", placeholder: column.kind === "percent" ? "> 1" : "", ariaLabel: `Range of ${column.title}` });
        input.title = "A range: 0.1-0.5, > 3 or < 0.2" + (column.kind === "percent" ? ", in percent" : "");
        input.addEventListener("input", () => { keep({ [`in.${column.name}`]: input.value }); refresh(); });
        tests.set(column, input);
        field.append(input);
      }
      filters.append(field);
    }
    head.append(names, filters);
    table.append(head, body);
    box.replaceChildren(table);

    const refresh = () => {
      const wanted = search.value.trim().toLowerCase().split(/\s+/).filter(Boolean);
      const lets = [];
      for (const [column, input] of tests) {
        const test = range(input.value, column.kind);
        input.classList.toggle("wrong", test === null);
        if (test && input.value.trim()) lets.push((i) => column.at(i) !== null && test(column.at(i)));
      }
      order = [];
      for (let i = 0; i < n; i++) {
        if (!lets.every((f) => f(i))) continue;
        if (wanted.length) {
          const words = text(i);
          if (!wanted.every((w) => words.includes(w))) continue;
        }
        order.push(i);
      }
      const column = columns.find((c) => c.name === sort) || columns[0], sign = down ? -1 : 1;
      const values = order.map((i) => column.at(i));
      const places = order.map((_, i) => i).sort((a, b) => {
        const x = values[a], y = values[b];
        if (x === null || y === null || x === "" || y === "") return (x === null || x === "") - (y === null || y === "") || a - b;
        return x < y ? -sign : x > y ? sign : a - b;
      });
      order = places.map((p) => order[p]);
      names.querySelectorAll("th").forEach((th, i) => th.setAttribute("aria-sort", columns[i] === column ? (down ? "descending" : "ascending") : "none"));
      count.textContent = order.length === n ? `${n.toLocaleString("en")} latents` : `${order.length.toLocaleString("en")} of ${n.toLocaleString("en")}`;
      box.scrollTop = 0; // another order: from its beginning
      draw();
    };

    const above = make("tr", undefined, { className: "space" }), below = above.cloneNode();
    body.append(above, below);
    let drawn = new Map();
    const rowOf = (i) => {
      const row = make("tr");
      row.dataset.row = i;
      for (const column of columns) {
        const value = column.at(i), cell = make("td", undefined, { className: column.kind });
        const words = value === null || value === "" ? "" : shown[column.kind](value);
        if (column.href && column.href(i)) cell.append(make("a", words, { href: column.href(i) }));
        else cell.textContent = words;
        if (column.kind === "words") cell.title = words;
        row.append(cell);
      }
      return row;
    };
    // A row that stays in sight stays the same element: one that is taken out and put back while the
    // button of the mouse is down would never be clicked.
    const draw = () => {
      const first = Math.max(0, Math.floor(box.scrollTop / ROW) - 10);
      const last = Math.min(order.length, first + Math.ceil(box.clientHeight / ROW) + 20);
      const rows = new Map(order.slice(first, last).map((i) => [i, drawn.get(i) || rowOf(i)]));
      for (const [i, row] of drawn) if (!rows.has(i)) row.remove();
      let next = above.nextSibling;
      for (const [i, row] of rows) {
        row.className = i === selected ? "selected" : "";
        if (row === next) next = next.nextSibling;
        else body.insertBefore(row, next);
      }
      drawn = rows;
      above.style.height = `${first * ROW}px`;
      below.style.height = `${(order.length - last) * ROW}px`;
    };

    const select = (i, reveal) => {
      selected = i;
      if (reveal) {
        const at = order.indexOf(i) * ROW;
        if (at < box.scrollTop || at > box.scrollTop + box.clientHeight - 4 * ROW) box.scrollTop = Math.max(0, at - box.clientHeight / 3);
      }
      draw();
      chosen(i);
    };
    const step = (by) => {
      if (!order.length) return;
      const at = order.indexOf(selected);
      select(order[Math.max(0, Math.min(order.length - 1, at < 0 ? 0 : at + by))], true);
    };
    body.addEventListener("click", (event) => {
      const row = event.target.closest("tr[data-row]");
      if (!row || event.metaKey || event.ctrlKey || !bsc.wide()) return;
      event.preventDefault();
      select(Number(row.dataset.row), false);
    });
    const key = (name) => {
      if (name === "j") step(1);
      else if (name === "k") step(-1);
      else if (name === "/") { search.focus(); search.select(); }
      else return false;
      return true;
    };
    addEventListener("keydown", (event) => {
      if (event.target.matches("input, select")) {
        if (event.key === "Escape") event.target.blur();
        return;
      }
      if (!event.metaKey && !event.ctrlKey && !event.altKey && key(event.key)) event.preventDefault();
    }, { signal });
    addEventListener("message", (event) => {
      const frames = [...document.querySelectorAll("iframe")].map((f) => f.contentWindow);
      if (frames.includes(event.source) && event.data && ["j", "k", "/"].includes(event.data.key)) { focus(); key(event.data.key); }
    }, { signal });
    search.value = state().get("q") || "";
    search.addEventListener("input", () => { keep({ q: search.value }); refresh(); }, { signal });
    box.addEventListener("scroll", draw, { signal });
    addEventListener("resize", draw, { signal });
    refresh();
    return { refresh, select, order: () => order };
  };

  bsc.wide = () => matchMedia("(min-width: 70rem)").matches;
  bsc.show = (frame, url) => { // replaced, so that the back button leaves the table
    frame.hidden = false;
    if (!frame.dataset.shown) { frame.src = url; frame.dataset.shown = "1"; } else frame.contentWindow.location.replace(new URL(url, location.href).href);
  };

  const columnsOf = (table, href) => [
    { name: "latent", title: "latent", kind: "latent", at: (i) => table.latents[i], href },
    ...table.columns.map((c) => ({ name: c.name, title: c.name, kind: c.kind, at: (i) => c.values[i] })),
  ];

  const startCoder = (main) => {
    const slug = main.dataset.coder, table = bsc.coders[slug], frame = document.querySelector("iframe");
    const deep = document.querySelector("#deep");
    const told = table.columns.filter((c) => c.kind === "words");
    let texts = null;
    const index = () => { texts = table.latents.map((latent, i) => [latent, ...told.map((c) => c.values[i]), deep.checked && bsc.contexts[slug] ? bsc.contexts[slug][i] : ""].join(" ").toLowerCase()); };
    const page = (i) => place(table.latents[i]);
    const view = bsc.table(main, columnsOf(table, page), table.latents.length, {
      first: { name: "rate", down: true },
      text: (i) => { if (!texts) index(); return texts[i]; },
      chosen: (i) => { keep({ latent: table.latents[i] }); if (bsc.wide()) bsc.show(frame, page(i)); else location.href = page(i); },
    });
    deep.addEventListener("change", () => {
      keep({ deep: deep.checked ? "1" : "" });
      const done = () => { texts = null; view.refresh(); };
      if (!deep.checked || bsc.contexts[slug]) return done();
      document.head.append(make("script", undefined, { src: "contexts.js", onload: done }));
    });
    if (state().get("deep") === "1") deep.click();
    const asked = table.latents.indexOf(Number(state().get("latent") ?? -1));
    if (bsc.wide() && table.latents.length) view.select(asked >= 0 ? asked : view.order()[0] ?? 0, true);
  };

  const startPair = (main) => {
    const [forth, back] = bsc.pairs, a = bsc.coders[forth.a], b = bsc.coders[forth.b];
    const at = (table) => new Map(table.latents.map((latent, i) => [latent, i]));
    const inA = at(a), inB = at(b), frames = document.querySelectorAll("iframe");
    const common = a.columns.filter((c) => c.kind !== "words").map((c) => [c, b.columns.find((d) => d.name === c.name && d.kind === c.kind)]).filter(([, d]) => d);
    // Every latent of a with its partner, then those of b that are nobody's mutual partner.
    const rows = forth.latent.map((partner, i) => ({ a: i, b: partner < 0 ? null : partner, cosine: partner < 0 ? null : forth.cosine[i], jaccard: partner < 0 ? null : forth.jaccard[i], matched: forth.mutual[i] === 1 }));
    back.latent.forEach((partner, i) => { if (back.mutual[i] !== 1) rows.push({ a: partner < 0 ? null : partner, b: i, cosine: partner < 0 ? null : back.cosine[i], jaccard: partner < 0 ? null : back.jaccard[i], matched: false, only: true }); });
    const value = (column, where, latent) => latent === null || !where.has(latent) ? null : column.values[where.get(latent)];
    const which = document.querySelector("#which"), axis = document.querySelector("#axis");
    let kept = rows;
    const paged = (r) => (r.a !== null && inA.has(r.a)) || (r.b !== null && inB.has(r.b)); // with --latents not all
    const link = (slug, where, latent) => latent !== null && where.has(latent) ? `../coders/${slug}/${place(latent)}` : null;
    const choose = () => { kept = rows.filter(paged).filter((r) => which.value === "all" || (which.value === "matched" ? r.matched : which.value === "a" ? !r.matched && !r.only : r.only)); };
    const columns = [
      { name: "first", title: "first", kind: "latent", at: (i) => kept[i].a, href: (i) => link(forth.a, inA, kept[i].a) },
      { name: "second", title: "second", kind: "latent", at: (i) => kept[i].b, href: (i) => link(forth.b, inB, kept[i].b) },
      { name: "cosine", title: "cosine", kind: "number", at: (i) => kept[i].cosine },
      { name: "jaccard", title: "Jaccard", kind: "number", at: (i) => kept[i].jaccard },
      ...["fires on"].flatMap((name) => [[a, inA, "a", "first"], [b, inB, "b", "second"]].map(([table, where, of, told]) => {
        const column = table.columns.find((c) => c.name === name);
        return { name: `${name}, ${told}`, title: `${name}, ${told}`, kind: "words", at: (i) => value(column, where, kept[i][of]) };
      })),
      ...common.flatMap(([c, d]) => [
        { name: `${c.name}, first`, title: `${c.name}, first`, kind: c.kind, at: (i) => value(c, inA, kept[i].a) },
        { name: `${c.name}, second`, title: `${c.name}, second`, kind: c.kind, at: (i) => value(d, inB, kept[i].b) },
      ]),
    ];
    const words = (table, where, latent) => latent === null || !where.has(latent) ? "" : table.columns.filter((c) => c.kind === "words").map((c) => c.values[where.get(latent)]).join(" ");
    const open = (r) => {
      [[frames[0], forth.a, r.a, inA], [frames[1], forth.b, r.b, inB]].forEach(([frame, slug, latent, where]) => {
        if (latent !== null && where.has(latent)) bsc.show(frame, `../coders/${slug}/${place(latent)}`); else frame.hidden = true;
      });
    };
    let view = null;
    const start = () => {
      choose();
      view = bsc.table(main, columns, kept.length, { text: (i) => `${kept[i].a} ${kept[i].b} ${words(a, inA, kept[i].a)} ${words(b, inB, kept[i].b)}`.toLowerCase(), chosen: (i) => open(kept[i]), first: { name: "cosine", down: true } });
      plot();
    };
    const canvas = document.querySelector("canvas");
    let points = [];
    const plot = () => {
      const [c, d] = common[Number(axis.value)], ratio = devicePixelRatio || 1, css = getComputedStyle(document.body);
      const side = canvas.clientWidth, pad = 44;
      canvas.width = canvas.height = side * ratio;
      const g = canvas.getContext("2d");
      g.scale(ratio, ratio);
      const pairs = kept.map((r) => [value(c, inA, r.a), value(d, inB, r.b), r]).filter(([x, y]) => x !== null && y !== null);
      const log = c.kind === "percent" || c.kind === "count";
      const f = (v) => log ? Math.log10(v) : v;
      const usable = pairs.filter(([x, y]) => !log || (x > 0 && y > 0));
      let low = Infinity, high = -Infinity;
      for (const [x, y] of usable) { low = Math.min(low, f(x), f(y)); high = Math.max(high, f(x), f(y)); }
      if (!usable.length) { low = 0; high = 1; }
      if (high === low) high = low + 1;
      const to = (v) => pad + (f(v) - low) / (high - low) * (side - pad - 12);
      g.clearRect(0, 0, side, side);
      g.strokeStyle = css.getPropertyValue("--line");
      g.beginPath(); g.moveTo(pad, side - pad); g.lineTo(side - 12, 12); g.moveTo(pad, 12); g.lineTo(pad, side - pad); g.lineTo(side - 12, side - pad); g.stroke();
      g.fillStyle = css.getPropertyValue("--quiet"); g.font = "12px system-ui";
      const label = (v) => shown[c.kind](log ? 10 ** v : v);
      g.fillText(label(low), pad, side - pad + 16); g.textAlign = "right"; g.fillText(label(high), side - 12, side - pad + 16);
      g.fillText(`${c.name}, first coder`, side - 12, side - 8);
      g.save(); g.translate(14, 12); g.rotate(-Math.PI / 2); g.fillText(`${c.name}, second coder`, 0, 0); g.restore();
      g.globalAlpha = 0.5;
      points = usable.map(([x, y, r]) => [to(x), side - to(y), r]);
      for (const [x, y, r] of points) { g.fillStyle = r.matched ? css.getPropertyValue("--matched") : css.getPropertyValue("--quiet"); g.fillRect(x - 2, y - 2, 4, 4); }
    };
    canvas.addEventListener("click", (event) => {
      let best = null, least = 200;
      for (const [x, y, r] of points) { const far = (x - event.offsetX) ** 2 + (y - event.offsetY) ** 2; if (far < least) { least = far; best = r; } }
      if (!best) return;
      const to = link(forth.a, inA, best.a) || link(forth.b, inB, best.b);
      if (!bsc.wide() && to) location.href = to; else view.select(kept.indexOf(best), true);
    });
    common.forEach(([c], i) => axis.append(make("option", c.name, { value: i })));
    which.addEventListener("change", start);
    axis.addEventListener("change", plot);
    addEventListener("resize", () => plot());
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", plot);
    start();
  };

  addEventListener("DOMContentLoaded", () => {
    document.body.classList.add("scripted");
    const main = document.querySelector("main[data-coder], main[data-pair]");
    if (main) ("coder" in main.dataset ? startCoder : startPair)(main);
  });
})();
