"use strict";
const value = (row, column) => row.cells[column].textContent.trim();
const number = (text) => (/^[+−-]?[\d.]/.test(text) ? parseFloat(text.replace(/,/g, "").replace("−", "-")) : NaN);
for (const table of document.querySelectorAll("table.sortable")) {
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
const open = () => {
  const target = document.getElementById(location.hash.slice(1));
  if (target && target.tagName === "DETAILS") target.open = true;
};
addEventListener("hashchange", open);
open();
