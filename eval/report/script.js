"use strict";
// Sorting of tables, search in the latents, and links to a latent. The page reads the same without it.
document.documentElement.classList.add("scripted");

for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = "\u21c5";
    button.title = "Sort";
    button.setAttribute("aria-label", "Sort by " + head.textContent.trim());
    button.addEventListener("click", () => {
      const down = head.getAttribute("aria-sort") !== "descending";
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const key = (row) => {
        const text = row.cells[column].dataset.value ?? row.cells[column].textContent.trim();
        return text !== "" && !Number.isNaN(Number(text)) ? Number(text) : text;
      };
      const compare = (a, b) => {
        const [x, y] = [key(a), key(b)];
        const order = typeof x === "number" && typeof y === "number"
          ? x - y : String(x).localeCompare(String(y));
        return down ? -order : order;
      };
      const body = table.tBodies[0];
      [...body.rows].sort(compare).forEach((row) => body.append(row));
    });
    head.append(button);
  });
}

const search = document.querySelector("#search");
if (search) {
  search.hidden = false;
  const field = search.querySelector("input");
  const said = search.querySelector("output");
  field.addEventListener("input", () => {
    const wanted = field.value.trim().toLowerCase();
    let found = 0;
    for (const coder of document.querySelectorAll("#latents > details")) {
      let here = 0;
      for (const latent of coder.querySelectorAll(".latent")) {
        const hit = wanted === "" || latent.dataset.name === wanted
          || latent.textContent.toLowerCase().includes(wanted);
        latent.hidden = !hit;
        here += hit ? 1 : 0;
      }
      coder.hidden = here === 0;
      if (wanted !== "") coder.open = here > 0;
      found += here;
    }
    said.textContent = wanted === "" ? "" : found + " latents";
  });
}

const openTarget = () => {
  const target = document.getElementById(decodeURIComponent(location.hash.slice(1)));
  for (let at = target; at; at = at.parentElement) if (at.tagName === "DETAILS") at.open = true;
  if (target) target.scrollIntoView();
};
window.addEventListener("hashchange", openTarget);
if (location.hash) openTarget();
