"use strict";
const all = (selector, within = document) => [...within.querySelectorAll(selector)];

// A heading of a table sorts by its column.
const value = (row, column) => row.cells[column].textContent.trim();
const leading = /^[+−-]?[\d.,]+(e[+-]?\d+)?(?=$|[\s%±[(])/; // of a date or an id it is none
const number = (text) => (leading.test(text) ? parseFloat(text.replace(/,/g, "").replace("−", "-")) : NaN);
for (const table of all("table.sortable")) {
  const headers = [...table.tHead.rows[0].cells];
  headers.forEach((header, column) => header.querySelector("button").addEventListener("click", () => {
    const sign = header.getAttribute("aria-sort") === "ascending" ? -1 : 1;
    const rows = [...table.tBodies[0].rows].sort((a, b) => {
      const [one, other] = [value(a, column), value(b, column)];
      if ((one === "–") !== (other === "–")) return one === "–" ? 1 : -1;
      const [first, second] = [number(one), number(other)];
      return sign * (isNaN(first) || isNaN(second) ? one.localeCompare(other, "en", { numeric: true }) : first - second);
    });
    table.tBodies[0].append(...rows);
    headers.forEach((each) => each.removeAttribute("aria-sort"));
    header.setAttribute("aria-sort", sign === 1 ? "ascending" : "descending");
  }));
}

// A filter keeps the rows, or the runs, that have all of its words.
for (const box of all("input[data-rows]")) {
  const of = document.getElementById(box.dataset.rows);
  const rows = (of.tBodies ? [...of.tBodies[0].rows] : [...of.children]).map((row) => [row, row.textContent.toLowerCase()]);
  box.addEventListener("input", () => {
    const words = box.value.toLowerCase().split(/\s+/);
    rows.forEach(([row, text]) => { row.hidden = !words.every((word) => text.includes(word)); });
  });
}

// What a link leads to is unfolded, and its tab is marked.
const arrive = () => {
  const target = document.getElementById(location.hash.slice(1));
  for (let each = target; each; each = each.parentElement) if (each.tagName === "DETAILS") each.open = true;
  if (target && !target.classList.contains("tab")) target.scrollIntoView();
  const tab = (target && target.closest(".tab")) || document.querySelector(".tab");
  all("nav a").forEach((link) => link.toggleAttribute("aria-current", tab && link.hash === `#${tab.id}`));
};
addEventListener("hashchange", arrive);
arrive();
